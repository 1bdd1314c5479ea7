/* SPDX-License-Identifier: GPL-2.0-only */
/* Entry (RSI = start_info), Xen notes, hypercall page. */
#include "xen.h"

        .section .text.start, "ax"
        .globl _start
_start:
        cld
        lea     boot_stack_top(%rip), %rsp
        mov     %rsi, %rdi
        xor     %ebp, %ebp
        call    guest_main
        ud2

        .balign 4096
        .globl hypercall_page
hypercall_page:
        .skip   4096

/* s64 hypercall(nr, a, b, c, d, e): C's argument registers to Xen's, then the stub in the hypercall page. */
        .text
        .globl hypercall
hypercall:
        mov     %rdi, %rax
        mov     %rsi, %rdi
        mov     %rdx, %rsi
        mov     %rcx, %rdx
        mov     %r8, %r10
        mov     %r9, %r8
        shl     $5, %rax
        add     $hypercall_page, %rax
        jmp     *%rax

        .macro  NOTE_QUAD type, value
        .pushsection .note.Xen, "a", @note
        .balign 4
        .long   4, 8, \type
        .asciz  "Xen"
        .quad   \value
        .popsection
        .endm
        .macro  NOTE_TEXT type, text
        .pushsection .note.Xen, "a", @note
        .balign 4
        .long   4, 9f - 8f, \type
        .asciz  "Xen"
8:      .asciz  "\text"
9:      .balign 4
        .popsection
        .endm

        NOTE_QUAD 1, _start                     /* ENTRY */
        NOTE_QUAD 2, hypercall_page             /* HYPERCALL_PAGE */
        NOTE_QUAD 3, VIRT_BASE                  /* VIRT_BASE */
        NOTE_QUAD 4, 0                          /* PADDR_OFFSET */
        NOTE_TEXT 5, "xen-3.0"                  /* XEN_VERSION */
        NOTE_TEXT 6, "pyxen-test"               /* GUEST_OS */
        NOTE_TEXT 8, "generic"                  /* LOADER */
        NOTE_TEXT 9, "yes"                      /* PAE_MODE */
        NOTE_TEXT 10, "pae_pgdir_above_4gb"       /* FEATURES */

        .bss
        .balign 4096
        .skip   32768
        .globl boot_stack_top
boot_stack_top:
