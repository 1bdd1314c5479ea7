/* SPDX-License-Identifier: GPL-2.0-only */
#include "guest.h"

void *memset(void *to, int value, u64 size)
{
    void *d = to;
    __asm__ volatile("rep stosb" : "+D"(d), "+c"(size) : "a"(value) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, u64 size)
{
    void *d = to;
    __asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(size) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, u64 size)
{
    const u8 *x = a, *y = b;
    for (; size; size--, x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}

u64 cmdline_number(const char *name, u64 otherwise)
{
    const char *line = start_info->cmd_line;
    while (*line) {
        const char *n = name;
        while (*n && *line == *n)
            line++, n++;
        if (!*n && *line == '=') {
            u64 value = 0;
            for (line++; *line >= '0' && *line <= '9'; line++)
                value = value * 10 + (*line - '0');
            return value;
        }
        while (*line && *line != ' ')
            line++;
        while (*line == ' ')
            line++;
    }
    return otherwise;
}
