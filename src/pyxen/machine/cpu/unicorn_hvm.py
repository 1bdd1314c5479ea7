# SPDX-License-Identifier: GPL-2.0-only
"""Guests under nested paging: what runs natively, between QEMU's code and Python.

Such a guest takes its exceptions through its own IDT. QEMU can do that (``x86_cpu_do_interrupt``), but a fault on the
way (the stack not present, the nested tables not filled) leaves by longjmp, and that must never cross a frame of
Python's. So the hooks of an engine are the two functions :func:`place` makes: they deliver what the guest takes itself
and call Python only for what it does not: exits, and everything of a PV guest. The rest of this module are patches of
instructions that Unicorn emptied (SYSCALL, SYSENTER) or that tell Python too little (MOV to CR, HLT, PAUSE).

All state is in the engine's *block*: its VMCB page, whose private half holds what is listed below. ``mtrr_deftype``, of
no other use here, points to it. HF2_NPT in ``hflags2`` tells these guests from PV ones.

An event (exception, interrupt, NMI) that is being delivered, or waits to be, is in the VMCB's EVENTINJ, where QEMU
keeps it too: when a nested fault ends its delivery it is still there, and :data:`ui.INTERRUPT_EVENT` in
``interrupt_request`` has it delivered again before the next instruction, as EXITINTINFO and EVENTINJ do on hardware.
INT n is not kept: the instruction is executed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.base import R11, RCX, RDX, RSP
from pyxen.machine.cpu.unicorn_code import JA, JAE, JB, JBE, JE, JMP, JNE, JNS, JS, Code, CodePage, jump

# --- the block: struct vmcb's control area (AMD APM volume 2, appendix B), then ours --------------------------------
MSRPM_BASE, EXIT_INFO_2, EVENT, EVENT_ERROR = 0x48, 0x80, 0xa8, 0xac
ON_EXCEPTION, ON_INVALID, ON_EXIT = 0xe00, 0xe08, 0xe10
"""Python's callbacks: PV exceptions, PV #UD, exits of both."""
INT_RIP = 0xe20         # address of the INT n that is being delivered
NEXT_RIP = 0xe28        # behind the instruction that left
CR_VALUE = 0xe30        # what MOV to CR, CLTS or LMSW would write
WALKING = 0xe38         # byte: the last nested walk was for a page-table entry
NMI = 0xe40             # u32: an NMI waits
PAUSE_EXITS = 0xe44     # u32
NOWHERE = 0xe48         # u32: permissions nobody asked for
DIRTY_MAP = 0xe50       # address of a byte for each frame of RAM, or 0: unicorn_dirty

VALID = 1 << 31
TYPE_INTERRUPT, TYPE_NMI, TYPE_EXCEPTION, TYPE_SOFTWARE = 0 << 8, 2 << 8, 3 << 8, 4 << 8
TYPE_MASK = 7 << 8

EXIT = 0x100            # UC_HOOK_INTR reports exits as 0x100 + SVM's exit code
EXIT_WRITE_CR0, EXIT_VINTR, EXIT_PAUSE, EXIT_HLT, EXIT_MSR = 0x10, 0x64, 0x77, 0x78, 0x7c
EXIT_SHUTDOWN, EXIT_VMMCALL, EXIT_NPF = 0x7f, 0x81, 0x400

_NESTING = sum(1 << vector for vector in (0, 8, 10, 11, 12, 13, 14))   # a fault while these are delivered is another
_DB, _GP, _UD = 1, 13, 6
_IF, _RF, _VM = 1 << 9, 1 << 16, 1 << 17
_ES, _CS, _SS, _DS = (ui.SEGS + ui.SEG_SIZE * n for n in range(4))
_LONG_CODE, _FLAT_CODE, _FLAT_DATA = 0x00a09b00, 0x00c09b00, 0x00c09300

# get_hphys: push r15; mov r15, rsi; push r14, r13, r12, rbp, rbx; sub rsp, 0x38; test byte [rdi+hflags2], NPT; jne
_GET_HPHYS = "4157 4989f7 4156 4155 4154 55 53 4883ec38 f687DDDD40 7516"
_GET_HPHYS_MOVED = "4157 4989f7"
_GET_HPHYS_DISTANCE = 0x1000       # it is before x86_cpu_tlb_fill, its caller
_CPU_ABORT = "50 e8DDDD"           # push rax; call abort
# helper_sysret, R11 -> RFLAGS: all of mask 0x277300, which VM and RF are no part of on hardware
_SYSRET_FLAGS = (("4881e2 ff8cd8ff", "4881e2 ff8cdbff"), ("81e7 00732700", "81e7 00732400"))


class Placed(NamedTuple):
    """Addresses of what :func:`place` placed: the two hooks, and shared ends of patches."""

    on_interrupt: int
    on_invalid: int
    leave_block: int
    enter_ring0: int
    protection: int


def _raise(lib: ui.Library, code: Code, vector: int) -> None:
    code.raw("488b0c24 be d 31d2", vector)                           # mov rcx,[rsp]; mov esi,vector; xor edx,edx
    code.raw("48b8 q ffe0", lib.address("raise_exception_err_ra_x86_64"))


def _for_hvm(code: Code) -> None:
    """rdi = env. Goes on with rax = block for a guest under nested paging on an engine of ours."""
    code.raw("f687 d b", ui.HFLAGS2, ui.HF2_NPT)                    # test [rdi+HFLAGS2],HF2_NPT
    code.far(JE, "original")
    code.raw("488b87 d 4885c0", ui.MTRR_DEFTYPE)                     # mov rax,[rdi+MTRR_DEFTYPE]; test rax,rax
    code.far(JE, "original")


def _on_interrupt(lib: ui.Library, code: Code) -> None:
    """UC_HOOK_INTR(uc, vector, block). Error codes that name a gate are n * 16 + 2 in QEMU's long mode."""
    code.raw("488b87 d 4c8d80 d", lib.uc_cpu, lib.cpu_env)  # mov rax,[rdi+lib.uc_cpu]; lea r8,[rax+lib.cpu_env]
    code.raw("81fe d", EXIT)                                         # cmp esi,EXIT
    code.far(JAE, "exit")
    code.raw("41f680 d b", ui.HFLAGS2, ui.HF2_NPT)                  # test [r8+HFLAGS2],HF2_NPT
    code.far(JNE, "hvm")
    code.raw("ffa2 d", ON_EXCEPTION)                                 # jmp [rdx+ON_EXCEPTION]
    code.label("hvm")
    code.raw("4183b8 d 00", ui.EXCEPTION_IS_INT)                     # cmp [r8+EXCEPTION_IS_INT],0
    code.far(JNE, "software")
    code.raw("448d4ef6 4183f903")                                    # lea r9d,[rsi-10]; cmp r9d,3
    code.far(JA, "deliver")
    code.raw("418b88 d", ui.ERROR_CODE)                              # mov ecx,[r8+ERROR_CODE]
    code.raw("41f680 d b", ui.HFLAGS + 1, ui.HF_LMA >> 8)           # test [r8+HFLAGS + 1],HF_LMA >> 8
    code.far(JE, "external")
    code.raw("f6c102")                                               # test cl,2
    code.far(JE, "external")
    code.raw("d1e9 83e1fe 83c902")                                   # shr ecx,1; and ecx,-2; or ecx,2
    code.label("external")
    code.raw("448b8a d 4585c9", EVENT)                               # mov r9d,[rdx+EVENT]; test r9d,r9d
    code.far(JNS, "code")
    code.raw("4181e100070000 4181f9 d", TYPE_SOFTWARE)                    # and r9d,0x700; cmp r9d,SOFTWARE
    code.far(JE, "code")
    code.raw("83c901")                                               # or ecx,1
    code.label("code")
    code.raw("418988 d", ui.ERROR_CODE)                              # mov [r8+ERROR_CODE],ecx
    code.label("deliver")
    code.raw("c782 d d 4889c7", EVENT, 0)                           # mov [rdx+EVENT],0; mov rdi,rax
    code.raw("48b8 q ffe0", lib.address("x86_cpu_do_interrupt_x86_64"))
    code.label("software")
    code.raw("418b88 d 85c9", ui.ERROR_CODE)                         # mov ecx,[r8+ERROR_CODE]; test ecx,ecx
    code.far(JNE, "length")
    code.raw("ffc1")                                                 # inc ecx
    code.label("length")
    code.raw("4d8b88 d 4929c9", ui.EXCEPTION_NEXT_EIP)               # mov r9,[r8+EXCEPTION_NEXT_EIP]; sub r9,rcx
    code.raw("4d8988 d 4c898a d", ui.EIP, INT_RIP)                   # mov [r8+EIP],r9; mov [rdx+INT_RIP],r9
    code.raw("c782 d d 53 4c89c3", EVENT, 0)                        # mov [rdx+EVENT],0; push rbx; mov rbx,r8
    code.raw("4889c7")                                               # mov rdi,rax
    code.raw("48b8 q ffd0", lib.address("x86_cpu_do_interrupt_x86_64"))
    code.raw("c783 d d 5b c3", ui.EXCEPTION_IS_INT, 0)  # mov [rbx+EXCEPTION_IS_INT],0; pop rbx; ret
    code.label("exit")
    code.raw("4183b8 d 00", ui.EXCEPTION_IS_INT)                     # cmp [r8+EXCEPTION_IS_INT],0
    code.far(JE, "python")
    code.raw("488b8a d 498988 d", INT_RIP, ui.EIP)                   # mov rcx,[rdx+INT_RIP]; mov [r8+EIP],rcx
    code.raw("41c780 d d", ui.EXCEPTION_IS_INT, 0)                  # mov [r8+EXCEPTION_IS_INT],0
    code.raw("c782 d d", EVENT, 0)                                  # mov [rdx+EVENT],0
    code.label("python")
    code.raw("ffa2 d", ON_EXIT)                                      # jmp [rdx+ON_EXIT]


def _on_invalid(lib: ui.Library, code: Code) -> None:
    """UC_HOOK_INSN_INVALID(uc, block): #UD or INT 6.

    VMCALL and VMMCALL, perhaps with REX prefixes, are hypercalls. INT1, which QEMU does not know, is #DB behind it.
    """
    code.raw("488b87 d 4c8d80 d", lib.uc_cpu, lib.cpu_env)  # mov rax,[rdi+lib.uc_cpu]; lea r8,[rax+lib.cpu_env]
    code.raw("41f680 d b", ui.HFLAGS2, ui.HF2_NPT)                  # test [r8+HFLAGS2],HF2_NPT
    code.far(JNE, "hvm")
    code.raw("ffa6 d", ON_INVALID)                                   # jmp [rsi+ON_INVALID]
    code.label("hvm")
    code.raw("53 55 4154")                                           # push rbx; push rbp; push r12
    code.raw("4155 4156 4c89c3")                                     # push r13; push r14; mov rbx,r8
    code.raw("4889f5 4989c5 c785 d d", EVENT, 0)  # mov rbp,rsi; mov r13,rax; mov [rbp+EVENT],0
    code.raw("4c8bb3 d 4c89b5 d", ui.EIP, INT_RIP)                   # mov r14,[rbx+EIP]; mov [rbp+INT_RIP],r14
    code.raw("83bb d 00", ui.EXCEPTION_IS_INT)                       # cmp [rbx+EXCEPTION_IS_INT],0
    code.far(JNE, "deliver")
    code.raw("4c03b3 d 41bc d", _CS + 8, 15 << 8)                    # add r14,[rbx+_CS + 8]; mov r12d,15 << 8
    code.label("byte")
    code.raw("4c89f6")                                               # mov rsi,r14
    code.raw("f683 d b", ui.HFLAGS + 1, ui.HF_CS64 >> 8)            # test [rbx+HFLAGS + 1],HF_CS64 >> 8
    code.far(JNE, "wide")
    code.raw("89f6")                                                 # mov esi,esi
    code.label("wide")
    code.raw("4889df")                                               # mov rdi,rbx
    code.raw("48b8 q ffd0", lib.address("cpu_ldub_code_x86_64"))
    code.raw("49ffc6 4188c4 3c0f")                                   # inc r14; mov r12b,al; cmp al,0x0f
    code.far(JE, "opcode")
    code.raw("3cf1")                                                 # cmp al,0xf1
    code.far(JE, "icebp")
    code.raw("4181ec00010000 4181fc00010000")                        # sub r12d,0x100; cmp r12d,0x100
    code.far(JB, "deliver")
    code.raw("f683 d b", ui.HFLAGS + 1, ui.HF_CS64 >> 8)            # test [rbx+HFLAGS + 1],HF_CS64 >> 8
    code.far(JE, "deliver")
    code.raw("24f0 3c40")                                            # and al,0xf0; cmp al,0x40
    code.far(JE, "byte")
    code.label("deliver")
    code.raw("4c89ef")                                               # mov rdi,r13
    code.raw("48b8 q ffd0", lib.address("x86_cpu_do_interrupt_x86_64"))
    code.raw("c783 d d", ui.EXCEPTION_IS_INT, 0)                    # mov [rbx+EXCEPTION_IS_INT],0
    code.far(JMP, "out")
    code.label("icebp")
    code.raw("4c2bb3 d 4c89b3 d", _CS + 8, ui.EIP)                   # sub r14,[rbx+_CS + 8]; mov [rbx+EIP],r14
    code.raw("41c785 d d", ui.CPU_EXCEPTION_INDEX, _DB)              # mov [r13+CPU_EXCEPTION_INDEX],_DB
    code.far(JMP, "deliver")
    code.label("opcode")
    code.raw("4889df 4c89f6")                                        # mov rdi,rbx; mov rsi,r14
    code.raw("48b8 q ffd0", lib.address("cpu_ldub_code_x86_64"))
    code.raw("3c01")                                                 # cmp al,1
    code.far(JNE, "deliver")
    code.raw("4889df 498d7601")                                      # mov rdi,rbx; lea rsi,[r14+1]
    code.raw("48b8 q ffd0", lib.address("cpu_ldub_code_x86_64"))
    code.raw("3cc1")                                                 # cmp al,0xc1
    code.far(JE, "hypercall")
    code.raw("3cd9")                                                 # cmp al,0xd9
    code.far(JNE, "deliver")
    code.label("hypercall")
    code.raw("4983c602 4c2bb3 d", _CS + 8)                           # add r14,2; sub r14,[rbx+_CS + 8]
    code.raw("4c89b5 d 488bbb d", NEXT_RIP, ui.UC_POINTER)           # mov [rbp+NEXT_RIP],r14; mov rdi,[rbx+UC_POINTER]
    code.raw("be d 4889ea", EXIT + EXIT_VMMCALL)                     # mov esi,EXIT + EXIT_VMMCALL; mov rdx,rbp
    code.raw("ff95 d", ON_EXIT)                                      # call [rbp+ON_EXIT]
    code.label("out")
    code.raw("415e 415d 415c")                                       # pop r14; pop r13; pop r12
    code.raw("5d 5b b8 d", 1)                                        # pop rbp; pop rbx; mov eax,1
    code.raw("c3")                                                   # ret


def _leave_block(lib: ui.Library, code: Code) -> None:
    """esi = exit code, [rsp] = return address in a block whose last instruction this is: leave behind it."""
    code.raw("57 56 4883ec08")                                       # push rdi; push rsi; sub rsp,8
    code.raw("488b742418 488b87 d", ui.UC_POINTER)                   # mov rsi,[rsp+24]; mov rax,[rdi+UC_POINTER]
    code.raw("488bb8 d", ui.UC_TCG)                                  # mov rdi,[rax+UC_TCG]
    code.raw("48b8 q ffd0", lib.address("tcg_tb_lookup_x86_64"))
    code.raw("4883c408 5e 5f")                                       # add rsp,8; pop rsi; pop rdi
    code.raw("488b8f d 488b10", ui.MTRR_DEFTYPE)                     # mov rcx,[rdi+MTRR_DEFTYPE]; mov rdx,[rax]
    code.raw("482b5008 0fb74014 4801c2")  # sub rdx,[rax+8]; movzx eax,[rax+20]; add rdx,rax
    code.raw("488991 d 488b0c24 31d2", NEXT_RIP)  # mov [rcx+NEXT_RIP],rdx; mov rcx,[rsp]; xor edx,edx
    code.raw("48b8 q ffe0", lib.address("cpu_vmexit_x86_64"))


def _enter_ring0(_lib: ui.Library, code: Code) -> None:
    """rdi = env, eax = selector of CS, ecx = its attributes, edx = HF_CS* and HF_SS32: flat segments of ring 0."""
    code.raw("8987 d 4883a7 d 00", _CS, _CS + 8)                     # mov [rdi+_CS],eax; and [rdi+_CS + 8],0
    code.raw("838f d ff 898f d", _CS + 16, _CS + 20)  # or [rdi+_CS + 16],-1; mov [rdi+_CS + 20],ecx
    code.raw("83c008 8987 d", _SS)                                   # add eax,8; mov [rdi+_SS],eax
    code.raw("4883a7 d 00", _SS + 8)                                 # and [rdi+_SS + 8],0
    code.raw("838f d ff", _SS + 16)                                  # or [rdi+_SS + 16],-1
    code.raw("c787 d d", _SS + 20, _FLAT_DATA)                      # mov [rdi+_SS + 20],_FLAT_DATA
    code.raw("8b87 d", ui.HFLAGS)                                    # mov eax,[rdi+HFLAGS]
    code.raw("25 d", ~(ui.HF_CPL | ui.HF_ADDSEG | ui.HF_CS64))       # and eax,~(HF_CPL | HF_ADDSEG | HF_CS64)
    code.raw("09d0 8987 d c3", ui.HFLAGS)                            # or eax,edx; mov [rdi+HFLAGS],eax; ret


def place(lib: ui.Library, page: CodePage) -> Placed:
    """Place the hooks and shared ends; :attr:`ui.Library.hvm` must be this before the patches' stubs are made."""
    addresses = []
    for assemble in (_on_interrupt, _on_invalid, _leave_block, _enter_ring0, lambda lib, code: _raise(lib, code, _GP)):
        code = page.begin()
        assemble(lib, code)
        page.place(code)
        addresses.append(code.address)
    return Placed(*addresses)


# --- patches: each ends at the label "original" ----------------------------------------------------------------------

def deliver_event(lib: ui.Library, code: Code) -> None:
    """x86_cpu_exec_interrupt(cs, request): what waits in the block, before the next instruction."""
    code.raw("f7c6 d", ui.INTERRUPT_EVENT)                           # test esi,INTERRUPT_EVENT
    code.far(JE, "original")
    code.raw("488b97 d", lib.cpu_env + ui.MTRR_DEFTYPE)              # mov rdx,[rdi+lib.cpu_env + MTRR_DEFTYPE]
    code.raw("4885d2")                                               # test rdx,rdx
    code.far(JE, "original")
    code.raw("8b82 d 85c0", EVENT)                                   # mov eax,[rdx+EVENT]; test eax,eax
    code.far(JS, "deliver")
    code.raw("83ba d 00", NMI)                                       # cmp [rdx+NMI],0
    code.far(JE, "nothing")
    code.raw("f687 d b", lib.cpu_env + ui.HFLAGS2, ui.HF2_NMI)      # test [rdi+lib.cpu_env + HFLAGS2],HF2_NMI
    code.far(JNE, "original")
    code.raw("f687 d b", lib.cpu_env + ui.HFLAGS, ui.HF_INHIBIT_IRQ)  # test [rdi+HFLAGS],HF_INHIBIT_IRQ
    code.far(JNE, "original")
    code.raw("c782 d d", NMI, 0)                                    # mov [rdx+NMI],0
    code.raw("b8 d 8982 d", VALID | TYPE_NMI | 2, EVENT)             # mov eax,VALID | TYPE_NMI | 2; mov [rdx+EVENT],eax
    code.label("deliver")
    code.raw("53 55 4883ec08")                                       # push rbx; push rbp; sub rsp,8
    code.raw("4889fb 4889d5 83ba d 00", NMI)  # mov rbx,rdi; mov rbp,rdx; cmp [rdx+NMI],0
    code.far(JNE, "keep")
    code.raw("8067 b fe", ui.CPU_INTERRUPT_REQUEST + 2)              # and [rdi+CPU_INTERRUPT_REQUEST + 2],0xfe
    code.label("keep")
    code.raw("89c1 81e100070000 81f9 d", TYPE_EXCEPTION)  # mov ecx,eax; and ecx,0x700; cmp ecx,TYPE_EXCEPTION
    code.far(JE, "exception")
    code.raw("81f9 d", TYPE_NMI)                                     # cmp ecx,TYPE_NMI
    code.far(JNE, "hard")
    code.raw("808b d b", lib.cpu_env + ui.HFLAGS2, ui.HF2_NMI)      # or [rbx+lib.cpu_env + HFLAGS2],HF2_NMI
    code.label("hard")
    code.raw("0fb6f0 ba d 488dbb d", 1, lib.cpu_env)  # movzx esi,al; mov edx,1; lea rdi,[rbx+lib.cpu_env]
    code.raw("48b8 q ffd0", lib.address("do_interrupt_x86_hardirq_x86_64"))
    code.far(JMP, "done")
    code.label("exception")
    code.raw("0fb6c0 8983 d", ui.CPU_EXCEPTION_INDEX)                # movzx eax,al; mov [rbx+CPU_EXCEPTION_INDEX],eax
    code.raw("8b8d d", EVENT_ERROR)                                  # mov ecx,[rbp+EVENT_ERROR]
    code.raw("898b d", lib.cpu_env + ui.ERROR_CODE)                  # mov [rbx+lib.cpu_env + ERROR_CODE],ecx
    code.raw("c783 d d", lib.cpu_env + ui.EXCEPTION_IS_INT, 0)  # mov [rbx+EXCEPTION_IS_INT],0
    code.raw("83c9ff ba d 0fa3c2", _NESTING)                         # or ecx,-1; mov edx,_NESTING; bt edx,eax
    code.raw("0f42c8")                                               # cmovc ecx,eax
    code.raw("898b d", lib.cpu_env + ui.OLD_EXCEPTION)               # mov [rbx+lib.cpu_env + OLD_EXCEPTION],ecx
    code.raw("4889df")                                               # mov rdi,rbx
    code.raw("48b8 q ffd0", lib.address("x86_cpu_do_interrupt_x86_64"))
    code.label("done")
    code.raw("c785 d d", EVENT, 0)                                  # mov [rbp+EVENT],0
    code.raw("838b d ff", ui.CPU_EXCEPTION_INDEX)                    # or [rbx+CPU_EXCEPTION_INDEX],-1
    code.raw("66c783 d ffff", lib.cpu_icount + 2)                    # mov [rbx+lib.cpu_icount + 2],0xffff
    code.raw("4883c408 5d 5b")                                       # add rsp,8; pop rbp; pop rbx
    code.raw("b8 d c3", 1)                                           # mov eax,1; ret
    code.label("nothing")
    code.raw("8067 b fe", ui.CPU_INTERRUPT_REQUEST + 2)              # and [rdi+CPU_INTERRUPT_REQUEST + 2],0xfe
    code.label("original")


def _write_crn(lib: ui.Library, code: Code) -> None:
    """helper_write_crN(env, reg, value), also the end of helper_lmsw: CR0, CR4 and CR8 leave."""
    _for_hvm(code)
    code.raw("83fe02")                                               # cmp esi,2
    code.far(JE, "original")
    code.raw("83fe03")                                               # cmp esi,3
    code.far(JE, "original")
    code.raw("488990 d 81c6 d", CR_VALUE, EXIT_WRITE_CR0)            # mov [rax+CR_VALUE],rdx; add esi,EXIT_WRITE_CR0
    code.jump(lib.hvm.leave_block)
    code.label("original")


def _clts(lib: ui.Library, code: Code) -> None:
    _for_hvm(code)
    code.raw("488b97 d 4883e2f7", ui.CR0)                            # mov rdx,[rdi+CR0]; and rdx,-9
    code.raw("488990 d be d", CR_VALUE, EXIT_WRITE_CR0)              # mov [rax+CR_VALUE],rdx; mov esi,EXIT_WRITE_CR0
    code.jump(lib.hvm.leave_block)
    code.label("original")


def _leave(lib: ui.Library, code: Code, exit_code: int) -> None:
    """rdi = env, esi = length, rax = block."""
    code.raw("4863f6 4803b7 d", ui.EIP)                              # movsxd rsi,esi; add rsi,[rdi+EIP]
    code.raw("4889b0 d be d 31d2", NEXT_RIP, exit_code)  # mov [rax+NEXT_RIP],rsi; mov esi,exit_code; xor edx,edx
    code.raw("488b0c24")                                             # mov rcx,[rsp]
    code.raw("48b8 q ffe0", lib.address("cpu_vmexit_x86_64"))
    code.label("original")


def _hlt(lib: ui.Library, code: Code) -> None:
    _for_hvm(code)
    _leave(lib, code, EXIT_HLT)


def _pause(lib: ui.Library, code: Code) -> None:
    """helper_pause(env, length): PV guests too, which therefore need no HF_GUEST and pay nothing."""
    code.raw("488b87 d 4885c0", ui.MTRR_DEFTYPE)                     # mov rax,[rdi+MTRR_DEFTYPE]; test rax,rax
    code.far(JE, "original")
    code.raw("83b8 d 00", PAUSE_EXITS)                               # cmp [rax+PAUSE_EXITS],0
    code.far(JE, "original")
    _leave(lib, code, EXIT_PAUSE)


def syscall(lib: ui.Library, code: Code) -> None:
    """helper_syscall(env, length): 64-bit mode only, as Intel's CPUs have it; ends at the label "pv"."""
    code.raw("f687 d b", ui.HFLAGS2, ui.HF2_NPT)                    # test [rdi+HFLAGS2],HF2_NPT
    code.far(JE, "pv")
    code.raw("f687 d 01", ui.EFER)                                   # test [rdi+EFER],1
    code.far(JE, "undefined")
    code.raw("f687 d b", ui.HFLAGS + 1, ui.HF_CS64 >> 8)            # test [rdi+HFLAGS + 1],HF_CS64 >> 8
    code.far(JE, "undefined")
    code.raw("53 4889fb 4863f6")                                     # push rbx; mov rbx,rdi; movsxd rsi,esi
    code.raw("4803b7 d 488977 b", ui.EIP, ui.GPR + 8 * RCX)          # add rsi,[rdi+EIP]; mov [rdi+GPR + 8 * RCX],rsi
    code.raw("48b8 q ffd0", lib.address("helper_read_eflags_x86_64"))
    code.raw("25 d 488943 b", ~_RF, ui.GPR + 8 * R11)                # and eax,~_RF; mov [rbx+GPR + 8 * R11],rax
    code.raw("8b8b d f7d1 21c8", ui.FMASK)                           # mov ecx,[rbx+FMASK]; not ecx; and eax,ecx
    code.raw("89c1 81e1 d", ui.FLAGS_IN_CC)                          # mov ecx,eax; and ecx,FLAGS_IN_CC
    code.raw("48898b d", ui.CC_SRC)                                  # mov [rbx+CC_SRC],rcx
    code.raw("c783 d d 89c1", ui.CC_OP, ui.CC_OP_EFLAGS)  # mov [rbx+CC_OP],CC_OP_EFLAGS; mov ecx,eax
    code.raw("81e100040000 f7d9 19c9")                               # and ecx,0x400; neg ecx; sbb ecx,ecx
    code.raw("83c901 898b d 25 d", ui.DF, ~ui.FLAGS_LAZY)            # or ecx,1; mov [rbx+DF],ecx; and eax,~FLAGS_LAZY
    code.raw("83c802 488983 d", ui.EFLAGS)                           # or eax,2; mov [rbx+EFLAGS],rax
    code.raw("8b83 d 25fcff0000 4889df", ui.STAR + 4)  # mov eax,[rbx+STAR + 4]; and eax,0xfffc; mov rdi,rbx
    code.raw("5b 488b8f d 48898f d", ui.LSTAR, ui.EIP)               # pop rbx; mov rcx,[rdi+LSTAR]; mov [rdi+EIP],rcx
    code.raw("b9 d", _LONG_CODE)                                     # mov ecx,_LONG_CODE
    code.raw("ba d", ui.HF_CS32 | ui.HF_SS32 | ui.HF_CS64)           # mov edx,HF_CS32 | HF_SS32 | HF_CS64
    code.jump(lib.hvm.enter_ring0)
    code.label("undefined")
    _raise(lib, code, _UD)
    code.label("pv")


def _sysenter(lib: ui.Library, code: Code) -> None:
    """helper_sysenter(env, length); RIP is known by the return address only."""
    code.raw("f687 d b", ui.HFLAGS2, ui.HF2_NPT)                    # test [rdi+HFLAGS2],HF2_NPT
    code.far(JE, "original")
    code.raw("448b87 d 4181e0fcff0000", ui.SYSENTER_CS)              # mov r8d,[rdi+SYSENTER_CS]; and r8d,0xfffc
    code.far(JE, "protection")
    code.raw("81a7 d d", ui.EFLAGS, ~(_IF | _RF | _VM))             # and [rdi+EFLAGS],~(_IF | _RF | _VM)
    code.raw("4c8b8f d", ui.SYSENTER_ESP)                            # mov r9,[rdi+SYSENTER_ESP]
    code.raw("4c8b97 d", ui.SYSENTER_EIP)                            # mov r10,[rdi+SYSENTER_EIP]
    code.raw("f687 d b", ui.HFLAGS + 1, ui.HF_LMA >> 8)             # test [rdi+HFLAGS + 1],HF_LMA >> 8
    code.raw("b9 d", _LONG_CODE)                                     # mov ecx,_LONG_CODE
    code.raw("ba d", ui.HF_CS32 | ui.HF_SS32 | ui.HF_CS64)           # mov edx,HF_CS32 | HF_SS32 | HF_CS64
    code.far(JNE, "enter")
    code.raw("4589c9 4589d2 b9 d", _FLAT_CODE)                       # mov r9d,r9d; mov r10d,r10d; mov ecx,_FLAT_CODE
    code.raw("ba d", ui.HF_CS32 | ui.HF_SS32)                        # mov edx,HF_CS32 | HF_SS32
    code.raw("488b87 d 480b87 d", _ES + 8, _DS + 8)                  # mov rax,[rdi+_ES + 8]; or rax,[rdi+_DS + 8]
    code.far(JE, "enter")
    code.raw("81ca d", ui.HF_ADDSEG)                                 # or edx,HF_ADDSEG
    code.label("enter")
    code.raw("4c894f b 4c8997 d", ui.GPR + 8 * RSP, ui.EIP)          # mov [rdi+GPR + 8 * RSP],r9; mov [rdi+EIP],r10
    code.raw("4489c0")                                               # mov eax,r8d
    code.jump(lib.hvm.enter_ring0)
    code.label("protection")
    code.jump(lib.hvm.protection)
    code.label("original")


def _sysret(lib: ui.Library, code: Code) -> None:
    """helper_sysret(env, operand size): #GP in ring 0 for a non-canonical RCX, as Intel's CPUs have it."""
    _for_hvm(code)
    code.raw("83fe02")                                               # cmp esi,2
    code.far(JNE, "original")
    code.raw("f687 d 01", ui.EFER)                                   # test [rdi+EFER],1
    code.far(JE, "original")
    code.raw("488b4f b 48c1f92f 48ffc1", ui.GPR + 8 * RCX)           # mov rcx,[rdi+GPR + 8 * RCX]; sar rcx,47; inc rcx
    code.raw("4883f901")                                             # cmp rcx,1
    code.far(JBE, "original")
    code.jump(lib.hvm.protection)
    code.label("original")


def _wrmsr(lib: ui.Library, code: Code) -> None:
    """helper_wrmsr(env): #GP for a non-canonical address in LSTAR, CSTAR, SYSENTER_ESP, _EIP, FS, GS, KERNEL_GS."""
    _for_hvm(code)
    code.raw("8b4f b 8d918bfeffff", ui.GPR + 8 * RCX)                # mov ecx,[rdi+GPR + 8 * RCX]; lea edx,[rcx-0x175]
    code.raw("83fa01")                                               # cmp edx,1
    code.far(JBE, "address")
    code.raw("8d917effff3f 83fa01")                                  # lea edx,[rcx+0x3fffff7e]; cmp edx,1
    code.far(JBE, "address")
    code.raw("8d9100ffff3f 83fa02")                                  # lea edx,[rcx+0x3fffff00]; cmp edx,2
    code.far(JA, "original")
    code.label("address")
    code.raw("8b4f b c1f90f ffc1", ui.GPR + 8 * RDX)                 # mov ecx,[rdi+GPR + 8 * RDX]; sar ecx,15; inc ecx
    code.raw("83f901")                                               # cmp ecx,1
    code.far(JBE, "original")
    code.jump(lib.hvm.protection)
    code.label("original")


def check_port(lib: ui.Library, code: Code, size: str) -> None:
    """rdi = env, esi = port: I/O of a guest under nested paging, by CPL, IOPL and TSS; ends at "original"."""
    code.raw("8b87 d c1e80c 83e003", ui.EFLAGS)                      # mov eax,[rdi+EFLAGS]; shr eax,12; and eax,3
    code.raw("8b8f d 83e103 39c1", ui.HFLAGS)                        # mov ecx,[rdi+HFLAGS]; and ecx,3; cmp ecx,eax
    code.far(JBE, "original")
    code.raw("57 56 52")                                             # push rdi; push rsi; push rdx
    code.raw("488b742418 4881ef d ba d", lib.cpu_env, 1)             # mov rsi,[rsp+24]; sub rdi,lib.cpu_env; mov edx,1
    code.raw("48b8 q ffd0", lib.address("cpu_restore_state_x86_64"))
    code.raw("488b7c2410 488b742408")                                # mov rdi,[rsp+16]; mov rsi,[rsp+8]
    code.raw("48b8 q ffd0", lib.address(f"helper_check_io{size}_x86_64"))
    code.raw("5a 5e 5f")                                             # pop rdx; pop rsi; pop rdi


def _get_hphys(lib: ui.Library, code: Code) -> None:
    """get_hphys(cs, gpa, access, permissions or null): null is for page-table entries, and NX there was a crash."""
    code.raw("f687 d b", lib.cpu_env + ui.HFLAGS2, ui.HF2_NPT)      # test [rdi+lib.cpu_env + HFLAGS2],HF2_NPT
    code.far(JE, "original")
    code.raw("488b87 d", lib.cpu_env + ui.MTRR_DEFTYPE)              # mov rax,[rdi+lib.cpu_env + MTRR_DEFTYPE]
    code.raw("4885c0")                                               # test rax,rax
    code.far(JE, "original")
    code.raw("4885c9 0f9480 d", WALKING)                             # test rcx,rcx; sete [rax+WALKING]
    code.far(JNE, "original")
    code.raw("488d88 d", NOWHERE)                                    # lea rcx,[rax+NOWHERE]
    code.label("original")


def _cpu_abort(lib: ui.Library, code: Code) -> None:
    """cpu_abort(cs, …): QEMU gives up on a guest whose TSS is no TSS. That is the guest's shutdown, not ours."""
    code.raw("f687 d b", lib.cpu_env + ui.HFLAGS2, ui.HF2_NPT)      # test [rdi+lib.cpu_env + HFLAGS2],HF2_NPT
    code.far(JE, "original")
    code.raw("488dbf d be d", lib.cpu_env, EXIT_SHUTDOWN)            # lea rdi,[rdi+lib.cpu_env]; mov esi,EXIT_SHUTDOWN
    code.raw("31d2 31c9")                                            # xor edx,edx; xor ecx,ecx
    code.raw("48b8 q ffe0", lib.address("cpu_vmexit_x86_64"))
    code.label("original")


PATCHES: tuple[tuple[str, str, Callable[[ui.Library, Code], None]], ...] = (
    ("helper_write_crN_x86_64", "4154 4989d4", _write_crn),                          # push r12; mov r12, rdx
    ("helper_clts_x86_64", "81a7b0000000fff7ffff", _clts),                           # and [rdi+hflags], ~TS
    ("helper_hlt_x86_64", "55 31d2 4863ee", _hlt),                                   # push rbp; …; movsxd rbp, esi
    ("helper_pause_x86_64", "55 31d2 4863ee", _pause),
    ("helper_sysenter_x86_64", "4157 4989ff", _sysenter),                            # push r15; mov r15, rdi
    ("helper_sysret_x86_64", "55 4889fd f6875002000001", _sysret),                   # push rbp; …; test [rdi+efer], SCE
    ("helper_wrmsr_x86_64", "55 488b4c2408", _wrmsr),                                # push rbp; mov rcx, [rsp+8]
)


def prepare(lib: ui.Library, page: CodePage) -> list[tuple[int, bytes]]:
    """Patches of functions that are not exported, or of their middle; returns (address, code) pairs to overwrite.

    Raises EngineError for an unknown build.
    """
    end = lib.address("x86_cpu_tlb_fill_x86_64")
    found = list(ui.pattern(_GET_HPHYS).finditer(ui.peek(end - _GET_HPHYS_DISTANCE, _GET_HPHYS_DISTANCE)))
    if len(found) != 1 or int.from_bytes(found[0].group(1), "little") != lib.cpu_env + ui.HFLAGS2:
        raise ui.unknown_build("get_hphys is not where it should be")
    entry = end - _GET_HPHYS_DISTANCE + found[0].start()
    moved = bytes.fromhex(_GET_HPHYS_MOVED)
    code = page.begin()
    _get_hphys(lib, code)
    code.raw(_GET_HPHYS_MOVED)
    code.jump(entry + len(moved))
    page.place(code)
    entries = [(entry, jump(entry, code.address))]

    entry = lib.address("cpu_abort_x86_64")
    (displacement,) = ui.match(lib.code("cpu_abort_x86_64", 6), _CPU_ABORT, "cpu_abort")
    code = page.begin()
    _cpu_abort(lib, code)
    code.raw("50 48b8 q ffd0", entry + 6 + (displacement ^ 1 << 31) - (1 << 31))     # push rax; call abort
    page.place(code)
    entries.append((entry, jump(entry, code.address)))

    content = lib.code("helper_sysret_x86_64", 0x100)
    for before, after in _SYSRET_FLAGS:
        at = content.find(bytes.fromhex(before))
        if at < 0:
            raise ui.unknown_build("helper_sysret is different")
        entries.append((lib.address("helper_sysret_x86_64") + at, bytes.fromhex(after)))
    return entries
