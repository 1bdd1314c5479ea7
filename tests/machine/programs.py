# SPDX-License-Identifier: GPL-2.0-only
"""Guest code of the conformance suite, assembled once (no compiler needed); each hex string has its source above it.

Intel syntax; a SYSCALL with EAX = 0 means "done" to :class:`tests.machine.support.Recorder`.
"""

from __future__ import annotations


def _hex(text: str) -> bytes:
    return bytes.fromhex(text)


# 1: inc rax; jmp 1b
SPIN = _hex("48ffc0ebfb")
# 1: syscall; jmp 1b
SYSCALL_LOOP = _hex("0f05ebfc")
# rex.w syscall; nop; xor eax,eax; syscall
PREFIXED_SYSCALL = _hex("480f059031c00f05")
# mov eax,0x5000; call rax; syscall
CALL_5000 = _hex("b800500000ffd00f05")
# mov eax,1; ret
RETURN_1 = _hex("b801000000c3")
# mov eax,2; ret
RETURN_2 = _hex("b802000000c3")
# 1: mov eax,0x5000; call rax; cmp eax,2; jne 1b; xor eax,eax; syscall
CALL_5000_UNTIL_2 = _hex("b800500000ffd083f80275f431c00f05")

# Every kind of instruction that a badly placed stop would execute twice; r15 = 0xbad if one was. rax=5 rbx=9 rcx=N
# rdi=N+1, rsi -> data.
# 1: cmp rax,rbx; jmp 2f
# 2: je 9f; mov dword ptr [rsi],5; dec dword ptr [rsi]; jmp 3f
# 3: je 9f; mov edx,1; neg edx; jmp 4f
# 4: jnc 9f; mov rdx,7; mov qword ptr [rsi+8],9; push rax; mov rax,9; lock cmpxchg [rsi+8],rdx; pop rax; jmp 5f
# 5: jne 9f; mov [rsi+16],rcx; jmp 6f
# 6: mov rdx,[rsi+16]; cmp rdx,rcx; jne 9f; inc qword ptr [rsi+24]; call 7f; mov rdx,[rsi+24]; add rdx,rcx; cmp
# rdx,rdi; jne 9f
#    push rcx; mov ecx,3; push rdi; lea rdi,[rsi+64]; rep stosq; sub rdi,rsi; cmp rdi,88; pop rdi; pop rcx; jne 9f
#    add r8,rcx; rol r8,7; xor r8,r9; lea r9,[r9+r8*2+1]; dec rcx; jnz 1b; xor eax,eax; syscall
# 7: xor edx,edx; ret
# 9: mov r15,0xbad; xor eax,eax; syscall
TORTURE = _hex(
    "4839d8eb000f8499000000c70605000000ff0eeb000f8489000000ba01000000f7daeb00737e48c7c20700000048c7460809"
    "0000005048c7c009000000f0480fb1560858eb00755c48894e10eb00488b56104839ca754d48ff4618e841000000488b5618"
    "4801ca4839fa753851b90300000057488d7e40f348ab4829f74883ff585f59751f4901c849c1c0074d31c84f8d4c410148ff"
    "c90f8563ffffff31c00f0531d2c349c7c7ad0b000031c00f05")

# Flags must survive a stop between the instruction that sets them and the one that tests them; r15 = 0xbad if not.
# eax=0 rcx=N
# 1: stc; jmp 2f; 2: jnc 9f; clc; jmp 3f; 3: jc 9f; cmp eax,1; jmp 4f; 4: ja 9f; std; jmp 5f; 5: pushf; pop rdx;
#    test edx,0x400; jz 9f; cld; dec rcx; jnz 1b; xor eax,eax; syscall; 9: mov r15,0xbad; xor eax,eax; syscall
FLAGS_TORTURE = _hex(
    "f9eb007323f8eb00721e83f801eb007717fdeb009c5af7c200040000740afc48ffc975dc31c00f0549c7c7ad0b000031c00f"
    "05")

# mov edi,0x20001; 1: inc ebx; mov [rdi],ebx; mov eax,0x5000; call rax; cmp eax,ebx; jne 9f; cmp ebx,1000; jne 1b
# xor eax,eax; syscall; 9: ud2
WRITE_CODE_AND_CALL = _hex("bf01000200ffc3891fb800500000ffd039d8750c81fbe803000075e931c00f050f0b")
# mov eax,0; ret      (its immediate, at +1, is what the above writes)
RETURN_IMMEDIATE = _hex("b800000000c3")

# mov rax,[rsi]; syscall; mov rax,[rsi]; syscall
LOAD_TWICE = _hex("488b060f05488b060f05")
# mov rax,[rsi]; syscall
LOAD = _hex("488b060f05")
# mov [rsi],rax; syscall
STORE = _hex("4889060f05")
# mov rax,[0x700000]
LOAD_700000 = _hex("488b042500007000")

# 1: lock inc qword ptr [rsi]; mov rdx,3; lock xadd [rsi+8],rdx; mov rax,rcx; xchg rax,[rsi+16]
# lock bts qword ptr [rsi+24],5; lock btr qword ptr [rsi+24],5
# mov rax,[rsi+32]; mov rdx,[rsi+40]; lea rbx,[rax+1]; push rcx; mov rcx,rdx; lock cmpxchg16b [rsi+32]; pop rcx
# dec rcx; jnz 1b; xor eax,eax; syscall
LOCKED = _hex(
    "f048ff0648c7c203000000f0480fc156084889c848874610f0480fba6e1805f0480fba761805488b4620488b5628488d5801"
    "514889d1f0480fc74e205948ffc975be31c00f05")

# A chain of integer, SSE and x87 state, N steps between two syscalls: only two constants differ. rcx=rdx=N, rsi ->
# int64
# 1: imul rbx,rbx,MUL; add rbx,ADD; movq xmm1,rbx; paddq xmm0,xmm1; pshufd xmm0,xmm0,0x4e; cvtsi2sd xmm2,rcx; addsd
# xmm3,xmm2
#    fild qword ptr [rsi]; faddp; dec rcx; jnz 1b; stc; syscall; adc r9,0; mov rcx,rdx; jmp 1b
FPU_A = _hex(
    "4869db457500004883c30566480f6ecb660fd4c1660f70c04ef2480f2ad1f20f58dadf2edec148ffc975d5f90f054983d100"
    "4889d1ebc9")
FPU_A_CONSTANTS = (30021, 5)
FPU_B = _hex(
    "4869dba11101004883c35266480f6ecb660fd4c1660f70c04ef2480f2ad1f20f58dadf2edec148ffc975d5f90f054983d100"
    "4889d1ebc9")
FPU_B_CONSTANTS = (70049, 82)

# cmp rax,rbx; syscall; pushf; pop r8; add rax,rbx; syscall; pushf; pop r9; std; inc rdx; syscall; pushf; pop r10; cld
# shl rcx,1; syscall; pushf; pop r11; xor eax,eax; syscall
FLAGS_AT_SYSCALLS = _hex("4839d80f059c41584801d80f059c4159fd48ffc20f059c415afc48d1e10f059c415b31c00f05")
# syscall; pushf; pop r8; xor eax,eax; syscall
SYSCALL_THEN_FLAGS = _hex("0f059c415831c00f05")
# mov eax,7; mov ecx,2; cpuid; syscall
CPUID = _hex("b807000000b9020000000fa20f05")
# cli; sti; cli; xor eax,eax; syscall
FAULT_THREE_TIMES = _hex("fafbfa31c00f05")
# push 0x2b; push rsp; add qword ptr [rsp],8; pushf; push 0x33; lea rax,[rip+1f]; push rax; iretq; 1: xor eax,eax;
# syscall
IRETQ = _hex("6a2b5448830424089c6a33488d05030000005048cf31c00f05")
# nop; nop; xor eax,eax; syscall
NOPS = _hex("909031c00f05")

# Refused to everything outside of ring 0 with #GP(0); INT n is in the suite itself, its error code names the gate.
PRIVILEGED = {
    "hlt": "f4", "cli": "fa", "sti": "fb", "in al,dx": "ec", "in ax,dx": "66ed", "in eax,dx": "ed",
    "in al,0x80": "e480", "out dx,al": "ee", "out dx,ax": "66ef", "out dx,eax": "ef", "out 0x80,al": "e680",
    "insb": "6c", "outsb": "6e", "rdmsr": "0f32", "wrmsr": "0f30", "mov rax,cr0": "0f20c0", "mov cr0,rax": "0f22c0",
    "mov rax,cr3": "0f20d8", "mov cr3,rax": "0f22d8", "mov cr4,rax": "0f22e0", "mov rax,cr8": "440f20c0",
    "mov rax,dr7": "0f21f8", "mov dr7,rax": "0f23f8", "lgdt [rsi]": "0f0116", "lidt [rsi]": "0f011e",
    "lldt ax": "0f00d0", "ltr ax": "0f00d8", "lmsw ax": "0f01f0", "clts": "0f06", "invlpg [rsi]": "0f013e",
    "wbinvd": "0f09", "invd": "0f08", "swapgs": "0f01f8", "sysretq": "480f07", "rdpmc": "0f33",
}

# Not instructions for a PV guest: #UD. (SYSENTER in 64-bit mode exists on Intel's CPUs only; the engine is an AMD one.)
UNDEFINED = {
    "ud2": "0f0b", "vmmcall": "0f01d9", "vmcall": "0f01c1", "monitor": "0f01c8", "mwait": "0f01c9", "clgi": "0f01dd",
    "vmrun": "0f01d8", "rsm": "0faa", "xgetbv": "0f01d0", "wrfsbase rax": "f3480faed0", "into": "ce", "push es": "06",
    "lock nop": "f090", "sysenter": "0f34", "vaddps ymm0,ymm1,ymm2": "c5f458c2",
}
