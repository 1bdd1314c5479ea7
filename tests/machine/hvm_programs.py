# SPDX-License-Identifier: GPL-2.0-only
"""Guest code of the tests of nested paging, assembled once; each hex string has its source above it. Intel syntax."""

from __future__ import annotations


def _hex(text: str) -> bytes:
    return bytes.fromhex(text)


# xor eax,eax; vmcall
STOP = _hex("31c00f01c1")
# xor eax,eax; vmmcall
VMMCALL = _hex("31c00f01d9")
# xor eax,eax; .byte 0x48; vmcall
VMCALL_REX = _hex("31c0480f01c1")
# .byte 0xf3; vmcall
VMCALL_REP = _hex("f30f01c1")
# ud2
UD2 = _hex("0f0b")
# xor ecx,ecx; div ecx; xor eax,eax; vmcall
DIVIDE = _hex("31c9f7f131c00f01c1")
# int 0x80; xor eax,eax; vmcall
INT80 = _hex("cd8031c00f01c1")
# nop; int 0x81; xor eax,eax; vmcall
INT81 = _hex("90cd8131c00f01c1")
# nop; int 6; xor eax,eax; vmcall
INT6 = _hex("90cd0631c00f01c1")
# int3; xor eax,eax; vmcall
INT3 = _hex("cc31c00f01c1")
# .byte 0xf1; xor eax,eax; vmcall
INT1 = _hex("f131c00f01c1")
# (32-bit) mov al,0x7f; inc al; into; xor eax,eax; vmcall
INTO = _hex("b07ffec0ce31c00f01c1")
# mov rax,[rsi]; mov rbx,rax; xor eax,eax; vmcall
LOAD = _hex("488b064889c331c00f01c1")
# (32-bit) mov eax,[esi]; mov ebx,eax; xor eax,eax; vmcall
LOAD32 = _hex("8b0689c331c00f01c1")
# mov [rsi],rdi; xor eax,eax; vmcall
STORE = _hex("48893e31c00f01c1")
# (32-bit) mov [esi],edi; xor eax,eax; vmcall
STORE32 = _hex("893e31c00f01c1")
# call rsi; xor eax,eax; vmcall
CALL_RSI = _hex("ffd631c00f01c1")
# mov ebx,7; ret
RETURN_7 = _hex("bb07000000c3")
# mov fs,bx; xor eax,eax; vmcall
LOAD_FS = _hex("8ee331c00f01c1")
# pushf; or dword ptr [rsp],0x100; popf; nop; nop; xor eax,eax; vmcall
TRAP_FLAG = _hex("9c810c24000100009d909031c00f01c1")
# hlt; xor eax,eax; vmcall
HALT = _hex("f431c00f01c1")
# sti; hlt; xor eax,eax; vmcall
STI_HALT = _hex("fbf431c00f01c1")
# pause; pause; xor eax,eax; vmcall
PAUSES = _hex("f390f39031c00f01c1")
# 1: inc rbx; jmp 1b
SPIN = _hex("48ffc3ebfb")
# 1: pause; inc rbx; jmp 1b
PV_PAUSES = _hex("f39048ffc3ebf9")
# rdmsr; mov rbx,rax; mov rsi,rdx; xor eax,eax; vmcall
RDMSR = _hex("0f324889c34889d631c00f01c1")
# wrmsr; xor eax,eax; vmcall
WRMSR = _hex("0f3031c00f01c1")
# wrmsr; xor eax,eax; xor edx,edx; rdmsr; mov rbx,rax; mov rsi,rdx; xor eax,eax; vmcall
WRMSR_RDMSR = _hex("0f3031c031d20f324889c34889d631c00f01c1")
# mov cr0,rax; xor eax,eax; vmcall
MOV_CR0 = _hex("0f22c031c00f01c1")
# mov cr4,rax; xor eax,eax; vmcall
MOV_CR4 = _hex("0f22e031c00f01c1")
# mov cr8,rax; mov rbx,cr8; xor eax,eax; vmcall
MOV_CR8 = _hex("440f22c0440f20c331c00f01c1")
# mov rax,cr3; mov cr3,rax; mov rbx,cr0; xor eax,eax; vmcall
MOV_CR3 = _hex("0f20d80f22d80f20c331c00f01c1")
# lmsw [rsi]; xor eax,eax; vmcall
LMSW = _hex("0f013631c00f01c1")
# clts; xor eax,eax; vmcall
CLTS = _hex("0f0631c00f01c1")
# cpuid; mov esi,eax; xor eax,eax; vmcall
CPUID = _hex("0fa289c631c00f01c1")
# rdtsc; mov ebx,eax; rdtscp; mov esi,ecx; sub eax,ebx; mov ebx,eax; invlpg [rsp]; wbinvd; xor eax,eax; vmcall
RDTSC = _hex("0f3189c30f01f989ce29d889c30f013c240f0931c00f01c1")
# in al,0x42; mov ebx,eax; mov dx,0x3f8; out dx,ax; in eax,dx; mov esi,eax; out 0x80,al; xor eax,eax; vmcall
IN_OUT = _hex("e44289c366baf80366efed89c6e68031c00f01c1")
# rep outsb; xor eax,eax; vmcall
REP_OUTS = _hex("f36e31c00f01c1")
# rep insd; xor eax,eax; vmcall
REP_INS = _hex("f36d31c00f01c1")
# sti; nop; nop; mov ebx,1; 1: inc ebx; jmp 1b
STI_SHADOW = _hex("fb9090bb01000000ffc3ebfc")
# mov eax,ss; out 0x80,al; mov ss,eax; nop; nop; 1: jmp 1b
MOV_SS_SHADOW = _hex("8cd0e6808ed09090ebfe")
# sti; 1: inc rbx; jmp 1b
STI_SPIN = _hex("fb48ffc3ebfb")
# 1: inc rbx; jmp 1b
NMI_SPIN = _hex("48ffc3ebfb")
# stc; syscall; mov ebx,0x55; vmcall
SYSCALL = _hex("f90f05bb550000000f01c1")
# sysretq
SYSRET = _hex("480f07")
# (32-bit) mov ecx,esp; mov edx,0x1100; sysenter
SYSENTER32 = _hex("89e1ba001100000f34")
# (32-bit) sysexit
SYSEXIT32 = _hex("0f35")
# mov al,[rsi+1]; mov ax,[rsi+2]; mov ebx,[rsi+4]; mov rcx,[rsi+8]; movdqu xmm0,[rsi+16]; mov [rsi+4],ebx;
#   mov [rsi+8],rdx; lock inc dword ptr [rsi+0x40]; xchg [rsi+0x44],edx; mov rax,[rsi+0xffc]; lea rsi,[rsi+0x80];
#   mov edi,0x10000; mov ecx,3; rep movsd; xor eax,eax; vmcall
MMIO_MIX = _hex(
    "8a4601668b46028b5e04488b4e08f30f6f4610895e0448895608f0ff4640875644488b86fc0f0000488db680000000bf0000"
    "0100b903000000f3a531c00f01c1")
# 1: mov eax,[rsi]; mov [rsi+0x10],eax; dec ecx; jnz 1b; xor eax,eax; vmcall
MMIO_LOOP = _hex("8b06894610ffc975f731c00f01c1")
# (32-bit) mov eax,cr4; or eax,0x20; mov cr4,eax; mov eax,0x40000; mov cr3,eax; mov ecx,0xc0000080; rdmsr;
#   or eax,0x100; wrmsr; mov eax,cr0; or eax,0x80000000; mov cr0,eax; ljmp 0x38,0x1080
LONG_MODE_SWITCH = _hex(
    "0f20e083c8200f22e0b8000004000f22d8b9800000c00f320d000100000f300f20c00d000000800f22c0ea801000003800")
# 1: push rax; pop rax; int3; add rbx,1; dec rcx; jnz 1b; xor eax,eax; vmcall
PUSH_LOOP = _hex("5058cc4883c30148ffc975f431c00f01c1")
# mov edi,0x20001; 1: inc ebx; mov [rdi],ebx; mov eax,0x5000; call rax; cmp eax,ebx; jne 9f; cmp ebx,1000; jne 1b;
#   xor eax,eax; vmcall; 9: ud2
WRITE_CODE = _hex("bf01000200ffc3891fb800500000ffd039d8750d81fbe803000075e931c00f01c10f0b")
# mov eax,0; ret
RETURN_IMMEDIATE = _hex("b800000000c3")
# vmrun
VMRUN = _hex("0f01d8")
# vmload
VMLOAD = _hex("0f01da")
# vmsave
VMSAVE = _hex("0f01db")
# stgi
STGI = _hex("0f01dc")
# clgi
CLGI = _hex("0f01dd")
# skinit
SKINIT = _hex("0f01de")
# invlpga
INVLPGA = _hex("0f01df")
# rsm
RSM = _hex("0faa")
# xor ecx,ecx; monitor
MONITOR = _hex("31c90f01c8")
# xor ecx,ecx; mwait
MWAIT = _hex("31c90f01c9")
# xor ecx,ecx; xsetbv
XSETBV = _hex("31c90f01d1")
# xor ecx,ecx; rdpmc
RDPMC = _hex("31c90f33")
# xor eax,eax; ltr ax; int 0x80
LTR_NULL_INT = _hex("31c00f00d8cd80")
# 1: inc rbx; mov rax,rbx; syscall; jmp 1b
PV_SYSCALL_LOOP = _hex("48ffc34889d80f05ebf6")
