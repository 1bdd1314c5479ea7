/* SPDX-License-Identifier: GPL-2.0-only */
/* Interrupts and exceptions of a PVH guest, by its own IDT, into the same struct regs as a PV guest's. */
#include "xen.h"

        .text
        .macro  TRAP vector, has_error
        .globl  trap_\vector
trap_\vector:
        .if     \has_error == 0
        push    $0
        .endif
        push    $\vector
        jmp     trap_common
        .endm

        .irp v, 0, 1, 2, 3, 4, 5, 6, 7, 9, 15, 16, 18, 19, 20
        TRAP \v, 0
        .endr
        .irp v, 8, 10, 11, 12, 13, 14, 17, 21
        TRAP \v, 1
        .endr

        .macro  HANDLE function
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
        cld
        mov     %rsp, %rdi
        call    \function
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
        add     $16, %rsp                       /* vector, error */
        iretq
        .endm

trap_common:
        HANDLE  trap_c

        .globl  event_entry
event_entry:
        push    $0
        push    $-1
        HANDLE  event_c
