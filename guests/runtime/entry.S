/* SPDX-License-Identifier: GPL-2.0-only */
/* Traps and events: Xen's bounce frame is RCX, R11, [error code], RIP, CS, RFLAGS, RSP, SS.
   Every handler returns through HYPERVISOR_iret. */
#include "xen.h"

        .text

/* Turn the bounce frame into struct regs (see guest.h): drop RCX and R11 from below the frame into their registers. */
        .macro  SAVE
        push    %rdi
        push    %rsi
        push    %rdx
        push    %rcx
        push    %rax
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        .endm

        .macro  RESTORE
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rax
        pop     %rcx
        pop     %rdx
        pop     %rsi
        pop     %rdi
        .endm

/* For vectors without an error code push a zero. */
        .macro  TRAP vector, has_error
        .globl  trap_\vector
trap_\vector:
        pop     %rcx
        pop     %r11
        .if     \has_error == 0
        push    $0
        .endif
        push    $\vector
        jmp     trap_common
        .endm

        .irp v, 0, 1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 18, 19, 20, 128, 145
        TRAP \v, 0
        .endr
        .irp v, 8, 10, 11, 12, 13, 14, 17, 21
        TRAP \v, 1
        .endr

trap_common:
        SAVE
        cld
        mov     %rsp, %rdi
        call    trap_c
        .globl  trap_return
trap_return:
        RESTORE
        add     $16, %rsp               /* vector, error */
        jmp     hypervisor_iret

        .globl  event_entry
event_entry:
        pop     %rcx
        pop     %r11
        push    $0
        push    $-1
        SAVE
        cld
        mov     %rsp, %rdi
        call    event_c
        jmp     trap_return

/* Here with RIP, CS, RFLAGS, RSP, SS on the stack: struct iret_context wants RAX, R11, RCX, flags below. */
        .globl  hypervisor_iret
hypervisor_iret:
        push    $0
        push    %rcx
        push    %r11
        push    %rax
        mov     $HC_iret, %eax
        syscall
        ud2

/* The failsafe callback: RCX, R11, DS, ES, FS, GS, then the frame. Reported as vector -2. */
        .globl  failsafe_entry
failsafe_entry:
        pop     %rcx
        pop     %r11
        add     $32, %rsp
        push    $0
        push    $-2
        jmp     trap_common

/* SYSCALL from user mode: RCX, R11, RIP, CS, RFLAGS, RSP, SS. Reported as vector -3. */
        .globl  syscall_entry
syscall_entry:
        pop     %rcx
        pop     %r11
        push    $0
        push    $-3
        jmp     trap_common

/* Where a vCPU starts that this guest brought up: on its own stack, aligned. */
        .globl  cpu_entry
cpu_entry:
        cld
        xor     %ebp, %ebp
        call    cpu_main
        ud2

/* s64 catch_trap(fn, arg): remember where to go on, call, -1. trap_c() sends a trap here with RSP from the buffer. */
        .globl  catch_trap
catch_trap:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, catch_stack(%rip)
        mov     %rdi, %rax
        mov     %rsi, %rdi
        call    *%rax
        movq    $0, catch_stack(%rip)
        mov     $-1, %rax
        jmp     1f
        .globl  catch_landing
catch_landing:
        mov     caught(%rip), %rax
1:      pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

/* void run_user(rip, rsp, arg, flags): leave for user mode; trap_c() comes back through user_landing. */
        .globl  run_user
run_user:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, user_return_stack(%rip)
        mov     %rcx, %r8               /* VGCF flags */
        pushq   $USER_SS
        push    %rsi
        pushq   $0x202
        pushq   $USER_CS
        push    %rdi
        push    %r8
        mov     %rdx, %rdi
        pushq   $0x1111                 /* rcx */
        pushq   $0x2222                 /* r11 */
        pushq   $0x3333                 /* rax */
        mov     $HC_iret, %eax
        syscall
        ud2
        .globl  user_landing
user_landing:
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .bss
        .balign 8
        .globl catch_stack, user_return_stack
catch_stack:
        .quad   0
user_return_stack:
        .quad   0
