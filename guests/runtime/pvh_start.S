/* SPDX-License-Identifier: GPL-2.0-only */
/* A PVH guest's beginning: 32-bit protected mode without paging, EBX = physical address of hvm_start_info. Page tables
   for long mode: the first 16 MiB by pages of 4 KiB (so that one can be changed), the rest of 4 GiB by 2 MiB; the first
   GiB is also at VIRT_BASE. */
#include "xen.h"

#define PHYS(symbol) (symbol - VIRT_BASE)
#define TABLE 7
#define PAGE 0x63
#define LARGE 0xe3
#define NR_L1 8

        .section .text.start, "ax"
        .code32
        .globl  pvh_start
pvh_start:
        cld
        mov     $PHYS(boot_stack_top), %esp
        /* level 1: 16 MiB */
        mov     $PHYS(pvh_l1), %edi
        mov     $PAGE, %eax
        mov     $(NR_L1 * 512), %ecx
1:      mov     %eax, (%edi)
        add     $0x1000, %eax
        add     $8, %edi
        loop    1b
        /* level 2: those, then large pages to 4 GiB */
        mov     $PHYS(pvh_l2), %edi
        mov     $(PHYS(pvh_l1) + TABLE), %eax
        mov     $NR_L1, %ecx
2:      mov     %eax, (%edi)
        add     $0x1000, %eax
        add     $8, %edi
        loop    2b
        mov     $(NR_L1 << 21 | LARGE), %eax
        mov     $(4 * 512 - NR_L1), %ecx
3:      mov     %eax, (%edi)
        add     $0x200000, %eax
        add     $8, %edi
        loop    3b
        /* level 3: identity, and VIRT_BASE */
        mov     $(PHYS(pvh_l2) + TABLE), %eax
        mov     %eax, PHYS(pvh_l3_high) + 510 * 8
        mov     $PHYS(pvh_l3), %edi
        mov     $4, %ecx
4:      mov     %eax, (%edi)
        add     $0x1000, %eax
        add     $8, %edi
        loop    4b
        movl    $(PHYS(pvh_l3) + TABLE), PHYS(pvh_l4)
        movl    $(PHYS(pvh_l3_high) + TABLE), PHYS(pvh_l4) + 511 * 8

        mov     $0x620, %eax                    /* PAE, OSFXSR, OSXMMEXCPT */
        mov     %eax, %cr4
        mov     $PHYS(pvh_l4), %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx
        rdmsr
        or      $0x100, %eax                    /* EFER.LME */
        wrmsr
        mov     $0x80010011, %eax               /* PG, WP, ET, PE */
        mov     %eax, %cr0
        lgdt    PHYS(gdt_pointer_low)
        ljmp    $0x08, $PHYS(long_mode)
        .code64
long_mode:
        movabs  $high_half, %rax
        jmp     *%rax
high_half:
        call    load_tables
        lea     boot_stack_top(%rip), %rsp
        mov     %ebx, %edi
        xor     %ebp, %ebp
        call    pvh_main
        ud2

/* GDT and flat segments; clobbers RAX. */
load_tables:
        lgdt    gdt_pointer(%rip)
        lidt    pvh_idt_pointer(%rip)
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        xor     %eax, %eax
        mov     %eax, %fs
        mov     %eax, %gs
        pop     %rax
        push    $0x08
        push    %rax
        lretq

/* Where a vCPU starts that this guest brought up (long mode, on its own stack). */
        .globl  cpu_entry
cpu_entry:
        cld
        call    load_tables
        xor     %ebp, %ebp
        call    cpu_main
        ud2

        .pushsection .note.Xen, "a", @note
        .balign 4
        .long   4, 4, 18                        /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz  "Xen"
        .long   PHYS(pvh_start)
        .popsection

        .section .rodata
        .balign 8
gdt:
        .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word   23
        .quad   gdt
gdt_pointer_low:
        .word   23
        .long   PHYS(gdt)
        .globl  pvh_idt_pointer
pvh_idt_pointer:
        .word   4095
        .quad   pvh_idt

        .bss
        .balign 4096
        .globl  pvh_l4, pvh_l1, pvh_idt
pvh_l4: .skip   4096
pvh_l3: .skip   4096
pvh_l3_high: .skip 4096
pvh_l2: .skip   4 * 4096
pvh_l1: .skip   NR_L1 * 4096
pvh_idt: .skip  4096
        .skip   16384
        .globl  boot_stack_top
boot_stack_top:
