# SPDX-License-Identifier: GPL-2.0-only
"""Linux's bzImage: find the kernel proper inside (Linux: Documentation/arch/x86/boot.rst; Xen: xc_dom_bzimageloader.c).

The setup header at 0x1f1 says where the protected-mode part starts and, from protocol 2.08 on, where in it the
compressed ELF lies. All but gzip payloads end in the unpacked size (u32); gzip's own trailer says the same.
"""

from __future__ import annotations

import struct
from typing import Final

from pyxen.errors import ImageError
from pyxen.toolstack.build.decompress import MAX_KERNEL_BYTES, compression, decompress

_SETUP_SECTS: Final = 0x1F1
_BOOT_FLAG: Final = 0x1FE
_MAGIC: Final = 0x202
_PROTOCOL: Final = 0x206
_PAYLOAD: Final = 0x248
_HEADER_END: Final = 0x250


def is_bzimage(data: bytes) -> bool:
    """True for anything with a Linux/x86 setup header, of whatever version."""
    return data[_BOOT_FLAG : _BOOT_FLAG + 2] == b"\x55\xaa" and data[_MAGIC : _MAGIC + 4] == b"HdrS"


def extract_kernel(data: bytes) -> bytes:
    """The unpacked ELF image inside a bzImage.

    Raises ImageError for a protocol older than 2.08, a payload outside of the file, or one that is damaged or larger
    than :data:`MAX_KERNEL_BYTES`.
    """
    if len(data) < _HEADER_END:
        raise ImageError("bzImage is truncated: it ends inside its setup header")
    (protocol,) = struct.unpack_from("<H", data, _PROTOCOL)
    if protocol < 0x208:
        raise ImageError(
            f"bzImage has boot protocol {protocol >> 8}.{protocol & 0xFF:02}, too old to say where its payload is",
            hint="2.08 (Linux 2.6.26) is the first that can be loaded; use the kernel's vmlinux instead",
        )
    offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    start = (data[_SETUP_SECTS] or 4) * 512 + 512 + offset
    if length < 8 or start + length > len(data):
        raise ImageError(
            f"bzImage is truncated: its payload is bytes {start} to {start + length}, the file has {len(data)}"
        )
    payload = data[start : start + length]
    if payload.startswith(b"\x7fELF"):
        return payload
    (size,) = struct.unpack_from("<I", payload, length - 4)
    if size > MAX_KERNEL_BYTES:
        raise ImageError(f"bzImage claims an absurd kernel size of {size} bytes")
    stream = payload if compression(payload) == "gzip" else payload[:-4]
    kernel = decompress(stream, size)
    if len(kernel) != size:
        raise ImageError(f"bzImage is damaged: its payload should unpack to {size} bytes, not {len(kernel)}")
    return kernel
