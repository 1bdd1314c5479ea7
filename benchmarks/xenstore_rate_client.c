/* SPDX-License-Identifier: GPL-2.0-only */
/* One xenstore client that waits for each answer: operations per second of a daemon at a unix socket.
 * usage: client SOCKET OPERATIONS ; prints "write N", "read N" and "transaction N" (start + write + commit), in 1/s. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

struct header { uint32_t type, req_id, tx_id, len; };
enum { XS_READ = 2, XS_TRANSACTION_START = 6, XS_TRANSACTION_END = 7, XS_WRITE = 11, XS_ERROR = 16 };

static int fd;
static char body[4097];

static void fail(const char *what) { perror(what); exit(1); }

static void receive(void *to, size_t size)
{
	for (size_t got = 0; got < size;) {
		ssize_t n = read(fd, (char *)to + got, size - got);
		if (n <= 0)
			fail("read");
		got += n;
	}
}

static void request(uint32_t type, uint32_t tx_id, const void *payload, uint32_t len)
{
	char message[128];
	struct header header = { type, 1, tx_id, len };

	memcpy(message, &header, sizeof header);
	memcpy(message + sizeof header, payload, len);
	if (write(fd, message, sizeof header + len) != (ssize_t)(sizeof header + len))
		fail("write");
	receive(&header, sizeof header);
	if (header.len >= sizeof body)
		exit(1);
	receive(body, header.len);
	body[header.len] = 0;
	if (header.type == XS_ERROR) {
		fprintf(stderr, "request %u: %s\n", type, body);
		exit(1);
	}
}

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	static const char key[] = "/bench/key", set[] = "/bench/key\0value-of-key";
	int count = argc == 3 ? atoi(argv[2]) : 0;
	double start;

	if (count <= 0 || strlen(argv[1]) >= sizeof address.sun_path)
		return 2;
	strcpy(address.sun_path, argv[1]);
	fd = socket(AF_UNIX, SOCK_STREAM, 0);
	if (fd < 0 || connect(fd, (void *)&address, sizeof address))
		fail("connect");

	start = seconds();
	for (int i = 0; i < count; i++)
		request(XS_WRITE, 0, set, sizeof set - 1);
	printf("write %.0f\n", count / (seconds() - start));

	start = seconds();
	for (int i = 0; i < count; i++)
		request(XS_READ, 0, key, sizeof key);
	printf("read %.0f\n", count / (seconds() - start));

	start = seconds();
	for (int i = 0; i < count / 4; i++) {
		request(XS_TRANSACTION_START, 0, "", 1);
		uint32_t tx_id = strtoul(body, NULL, 10);
		request(XS_WRITE, tx_id, set, sizeof set - 1);
		request(XS_TRANSACTION_END, tx_id, "T", 2);
	}
	printf("transaction %.0f\n", count / 4 / (seconds() - start));
	return 0;
}
