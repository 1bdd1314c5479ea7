# SPDX-License-Identifier: GPL-2.0-only
"""The root file system of the guests we fetch: busybox, a handful of links and one script.

The kernel's command line chooses what it does after ``pyxen: first user line``:

    pyxen.mode=shell      (default) a shell on the console; ``poweroff``, ``reboot`` and xl's shutdown work
    pyxen.mode=poweroff   show the machine, do a little work, power off
    pyxen.mode=bench      the fixed workload of benchmarks/, then power off
"""

from __future__ import annotations

from typing import Final

from pyxen.toolstack.guests.cpio import CpioWriter

FIRST_USER_LINE: Final = "pyxen: first user line"
WORKLOAD_DONE: Final = "pyxen: workload done"

_DIRECTORIES: Final = ("bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "usr", "usr/bin", "usr/sbin")
# The kernel runs these by path: /sbin/poweroff and /sbin/reboot when the toolstack asks it to (kernel/reboot.c).
_LINKS: Final = ("bin/sh", "bin/mount", "sbin/init", "sbin/poweroff", "sbin/reboot", "sbin/halt")

INIT: Final = f"""#!/bin/busybox sh
# PID 1 of pyxen's guests. busybox runs its applets without looking for files.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
echo "{FIRST_USER_LINE}"
uname -a

mode=shell
for word in $(cat /proc/cmdline); do
    case $word in pyxen.mode=*) mode=${{word#pyxen.mode=}} ;; esac
done

case $mode in
poweroff)
    head -n 2 /proc/meminfo
    head -c 1000000 /dev/zero | md5sum
    ;;
bench)
    i=0
    while [ $i -lt 60 ]; do ls -l /proc /sys/devices >/dev/null; i=$((i + 1)); done
    head -c 3000000 /dev/zero | md5sum
    dmesg | gzip -c | wc -c
    ;;
*)
    [ "$mode" = shell ] || echo "pyxen: unknown pyxen.mode=$mode, starting a shell"
    busybox --install -s
    mkdir -p /tmp
    hostname "${{HOSTNAME:-guest}}"
    # The console device by its own name: a shell on /dev/console itself has no job control.
    console=$(sed 's/.* //' /sys/class/tty/console/active)
    echo "$console::respawn:-/bin/sh" >/etc/inittab
    echo "Type poweroff to end."
    exec /sbin/init
    ;;
esac
echo "{WORKLOAD_DONE}"
poweroff -f
"""


def build_initramfs(busybox: bytes) -> bytes:
    """An initramfs around a static busybox. Not compressed: unpacking is work for the slower CPU, the guest's."""
    archive = CpioWriter()
    for directory in _DIRECTORIES:
        archive.directory(directory)
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, 0o666)
    archive.file("bin/busybox", busybox, 0o755)
    for link in _LINKS:
        archive.symlink(link, "/bin/busybox")
    archive.file("init", INIT.encode(), 0o755)
    return archive.finish()
