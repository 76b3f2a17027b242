/* A guest in C: every type, errors, host functions, memory, logging. The tests build and run it. */
#include "skerry_sandbox.h"

static int64_t calls;
static int32_t started;

static void start(void) {
    started = 42;
    SKERRY_LOG(SKERRY_INFO, "started in C");
}
SKERRY_INIT(start);

static bool add(const skerry_value *arguments, skerry_value *result) {
    calls++;
    result->as.i32 = (int32_t)((uint32_t)arguments[0].as.i32 + (uint32_t)arguments[1].as.i32);
    return true;
}
SKERRY_EXPORT(add, SKERRY_I32, SKERRY_I32, SKERRY_I32);

static bool initialised(const skerry_value *arguments, skerry_value *result) {
    (void)arguments;
    result->as.i32 = started;
    return true;
}
SKERRY_EXPORT(initialised, SKERRY_I32);

static bool count(const skerry_value *arguments, skerry_value *result) {
    (void)arguments;
    result->as.i64 = calls;
    return true;
}
SKERRY_EXPORT(count, SKERRY_I64);

static bool nothing(const skerry_value *arguments, skerry_value *result) {
    (void)arguments;
    (void)result;
    return true;
}
SKERRY_EXPORT(nothing, SKERRY_UNIT);

/* Values of all types come back as they are. */
#define ECHO(name_, type_)                                                       \
    static bool name_(const skerry_value *arguments, skerry_value *result) {     \
        *result = arguments[0];                                                  \
        return true;                                                             \
    }                                                                            \
    SKERRY_EXPORT(name_, type_, type_)

ECHO(echo_bool, SKERRY_BOOL);
ECHO(echo_u32, SKERRY_U32);
ECHO(echo_i64, SKERRY_I64);
ECHO(echo_u64, SKERRY_U64);
ECHO(echo_f32, SKERRY_F32);
ECHO(echo_f64, SKERRY_F64);
ECHO(echo_string, SKERRY_STRING);
ECHO(echo_bytes, SKERRY_BYTES);

#ifndef __SOFT_FLOAT__
#ifdef __SSE2__
static bool half(const skerry_value *arguments, skerry_value *result) {
    result->as.f64 = arguments[0].as.f64 / 2;
    return true;
}
SKERRY_EXPORT(half, SKERRY_F64, SKERRY_F64);
#endif
#endif

static bool reverse(const skerry_value *arguments, skerry_value *result) {
    size_t length = arguments[0].as.bytes.length;
    const uint8_t *from = arguments[0].as.bytes.data;
    uint8_t *to = malloc(length);
    if (to == NULL) {
        return skerry_fail(result, "no memory");
    }
    for (size_t n = 0; n < length; n++) {
        to[n] = from[length - 1 - n];
    }
    result->as.bytes.data = to;
    result->as.bytes.length = length;
    skerry_free_later(to);
    return true;
}
SKERRY_EXPORT(reverse, SKERRY_BYTES, SKERRY_BYTES);

static bool refuse(const skerry_value *arguments, skerry_value *result) {
    (void)arguments;
    return skerry_fail(result, "not today");
}
SKERRY_EXPORT(refuse, SKERRY_I32, SKERRY_STRING);

/* Asks the host for "host_add", then for "host_name"; says why not. */
static bool ask(const skerry_value *arguments, skerry_value *result) {
    skerry_value numbers[2] = {arguments[0], skerry_i32(2)};
    skerry_value sum, name;
    if (!skerry_host_call("host_add", numbers, 2, &sum)) {
        return *result = sum, false;
    }
    if (!skerry_host_call("host_name", &sum, 1, &name)) {
        return *result = name, false;
    }
    *result = name;
    skerry_free_later((void *)name.as.bytes.data);
    return true;
}
SKERRY_EXPORT(ask, SKERRY_STRING, SKERRY_I32);

static bool blocks(const skerry_value *arguments, skerry_value *result) {
    uint32_t wanted = arguments[0].as.u32;
    uint64_t sum = 0;
    for (uint32_t n = 1; n <= wanted; n++) {
        uint8_t *block = calloc(n, 3);
        block = realloc(block, n * 7);
        if (block == NULL || ((uintptr_t)block & 15) != 0) {
            return skerry_fail(result, "a bad block");
        }
        memset(block + n * 3, 1, n * 4);
        for (uint32_t at = 0; at < n * 7; at++) {
            sum += block[at];
        }
        free(block);
    }
    result->as.u64 = sum;
    return true;
}
SKERRY_EXPORT(blocks, SKERRY_U64, SKERRY_U32);

static bool peek(const skerry_value *arguments, skerry_value *result) {
    result->as.u64 = *(const volatile uint64_t *)(uintptr_t)arguments[0].as.u64;
    return true;
}
SKERRY_EXPORT(peek, SKERRY_U64, SKERRY_U64);

static bool give_up(const skerry_value *arguments, skerry_value *result) {
    (void)arguments;
    (void)result;
    skerry_panic("given up in C");
}
SKERRY_EXPORT(give_up, SKERRY_UNIT);
