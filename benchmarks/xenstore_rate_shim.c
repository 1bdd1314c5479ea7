/* SPDX-License-Identifier: GPL-2.0-only */
/* LD_PRELOAD for Debian's xenstored on a machine without Xen: just enough of libxenctrl, libxenevtchn and libxengnttab
 * for it to start, with a dom0 that never signals. Files it opens under /proc/xen and /dev/xen come from $XS_FAKE. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>

static int open_mapped(const char *name, const char *path, int flags, mode_t mode)
{
	int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, name);
	const char *fake = getenv("XS_FAKE");
	char mapped[4096];

	if (fake && path && (!strncmp(path, "/proc/xen/", 10) || !strncmp(path, "/dev/xen/", 9))) {
		snprintf(mapped, sizeof mapped, "%s%s", fake, strrchr(path, '/'));
		path = mapped;
	}
	return real(path, flags, mode);
}

#define OPEN(name) int name(const char *path, int flags, ...) { \
	va_list rest; mode_t mode; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); \
	return open_mapped(#name, path, flags, mode); }
OPEN(open)
OPEN(open64)
int setrlimit(__rlimit_resource_t what, const struct rlimit *limit) { return 0; }

static int event_fd = -1;
void *xenevtchn_open(void *log, unsigned flags)
{
	if (event_fd < 0)
		event_fd = eventfd(0, EFD_NONBLOCK);
	return &event_fd;
}
void *xenevtchn_fdopen(void *log, int fd, unsigned flags) { return xenevtchn_open(log, flags); }
int xenevtchn_close(void *handle) { return 0; }
int xenevtchn_fd(void *handle) { return event_fd; }
int xenevtchn_bind_interdomain(void *handle, uint32_t domid, uint32_t port) { return 5; }
int xenevtchn_bind_virq(void *handle, unsigned virq) { return 6; }
int xenevtchn_notify(void *handle, uint32_t port) { return 0; }
int xenevtchn_unbind(void *handle, uint32_t port) { return 0; }
int xenevtchn_pending(void *handle) { return -1; }
int xenevtchn_unmask(void *handle, uint32_t port) { return 0; }
void *xengnttab_open(void *log, unsigned flags) { return &event_fd; }
int xengnttab_close(void *handle) { return 0; }
int xengnttab_set_max_grants(void *handle, uint32_t count) { return 0; }
void *xengnttab_map_grant_ref(void *handle, uint32_t domid, uint32_t ref, int prot)
{
	return mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_SHARED, -1, 0);
}
int xengnttab_unmap(void *handle, void *page, uint32_t count) { return munmap(page, 4096); }
void *xc_interface_open(void *log, void *dombuild, unsigned flags) { return calloc(1, 65536); }
int xc_interface_close(void *handle) { return 0; }
int xc_domain_getinfo(void *handle, uint32_t domid, unsigned max, uint32_t *info)
{
	memset(info, 0, 64);
	*info = domid;
	return 1;
}
int xc_domain_getinfolist(void *handle, uint32_t domid, unsigned max, void *info)
{
	if (domid)
		return 0;
	memset(info, 0, 112);
	return 1;
}
