/* Guests of function sandboxes in C.
 *
 *     cc -O2 -ffreestanding -fno-stack-protector -nostdlib -static -Iguest/sandbox-rt/include \
 *         guest.c libskerry_sandbox.a -o guest
 *
 * libskerry_sandbox.a is made by `cargo build --release -p skerry-sandbox-c` in guest/sandbox-rt. A guest
 * without SSE instructions needs `-mgeneral-regs-only -mno-sse` here, and the library built with
 * `--target x86_64-unknown-none`. docs/src/sandbox-guests.md has an example.
 *
 * The library has memcpy, memmove, memset, memcmp, strlen, malloc, calloc, realloc, free and abort of the
 * C standard; everything else of a C library is not there. There is one thread.
 */
#ifndef SKERRY_SANDBOX_H
#define SKERRY_SANDBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Types that pass the border. */
typedef enum skerry_type {
    SKERRY_UNIT = 0,
    SKERRY_BOOL = 1,
    SKERRY_I32 = 2,
    SKERRY_U32 = 3,
    SKERRY_I64 = 4,
    SKERRY_U64 = 5,
    SKERRY_F32 = 6,
    SKERRY_F64 = 7,
    SKERRY_STRING = 8, /* UTF-8, without a zero at its end */
    SKERRY_BYTES = 9,
} skerry_type;

/* A value and its type. */
typedef struct skerry_value {
    uint32_t type; /* of skerry_type */
    union {
        bool boolean;
        int32_t i32;
        uint32_t u32;
        int64_t i64;
        uint64_t u64;
        float f32;
        double f64;
        struct {
            const void *data;
            size_t length;
        } bytes; /* SKERRY_STRING, SKERRY_BYTES */
    } as;
} skerry_value;

/* A function that the host can call. `arguments` are as many and of the types that it was registered
 * with; what they point to is there until it returns. `result` has the registered type and is zero: fill
 * in the value and return true; or set a string as the message (skerry_fail) and return false. What the
 * result points to is copied when the function has returned: not memory of the function's own frame. */
typedef bool (*skerry_function)(const skerry_value *arguments, skerry_value *result);

typedef struct skerry_export {
    const char *name;
    skerry_function function;
    const uint8_t *parameters;
    size_t count;
    uint64_t returns;
} skerry_export;

/* Makes `function` one that the host can call as "function":
 *
 *     static bool add(const skerry_value *arguments, skerry_value *result) { … }
 *     SKERRY_EXPORT(add, SKERRY_I32, SKERRY_I32, SKERRY_I32);     the result's type, then the parameters'
 */
#define SKERRY_EXPORT(function_, returns_, ...)                                                        \
    static const uint8_t skerry_types_##function_[] = {(returns_), ##__VA_ARGS__};                     \
    __attribute__((used, section("skerry_c_exports"), aligned(8)))                                     \
    static const skerry_export skerry_export_##function_ = {                                           \
        #function_, function_, skerry_types_##function_ + 1, sizeof(skerry_types_##function_) - 1,     \
        (returns_)}

/* Registers a function by hand, from a function of SKERRY_INIT. `record` stays what it is. */
void skerry_register(const skerry_export *record);

/* Makes `function`, a void (*)(void), run once before the first call. */
typedef void (*skerry_init_function)(void);
#define SKERRY_INIT(function_)                                                                         \
    __attribute__((used, section("skerry_c_inits"), aligned(8)))                                       \
    static const skerry_init_function skerry_init_##function_ = function_

/* Calls a function of the host's. True: `result` is what it returned; false: a string that says why not.
 * Either way skerry_release(result) frees it. */
bool skerry_host_call(const char *name, const skerry_value *arguments, size_t count,
                      skerry_value *result);
void skerry_release(skerry_value *value);

/* Frees a block of malloc's when the result of the call has been copied. */
void skerry_free_later(void *block);

typedef enum skerry_level {
    SKERRY_ERROR = 1,
    SKERRY_WARN = 2,
    SKERRY_INFO = 3,
    SKERRY_DEBUG = 4,
    SKERRY_TRACE = 5,
} skerry_level;

/* A record of the host's log. */
void skerry_log_at(uint32_t level, const char *file, uint32_t line, const char *text);
#define SKERRY_LOG(level_, text_) skerry_log_at((level_), __FILE__, __LINE__, (text_))

/* Gives up: the call ends with this message, and the sandbox has to be restored. */
_Noreturn void skerry_panic(const char *message);
_Noreturn void abort(void);

/* A number that no other sandbox has, new after each restore. Not for keys. */
uint64_t skerry_seed(void);

void *malloc(size_t size);
void *calloc(size_t count, size_t size);
void *realloc(void *block, size_t size);
void free(void *block);
void *memcpy(void *restrict to, const void *restrict from, size_t length);
void *memmove(void *to, const void *from, size_t length);
void *memset(void *to, int byte, size_t length);
int memcmp(const void *a, const void *b, size_t length);
size_t strlen(const char *text);

static inline skerry_value skerry_i32(int32_t value) {
    skerry_value made = {SKERRY_I32, {0}};
    made.as.i32 = value;
    return made;
}

static inline skerry_value skerry_i64(int64_t value) {
    skerry_value made = {SKERRY_I64, {0}};
    made.as.i64 = value;
    return made;
}

static inline skerry_value skerry_bytes(const void *data, size_t length) {
    skerry_value made = {SKERRY_BYTES, {0}};
    made.as.bytes.data = data;
    made.as.bytes.length = length;
    return made;
}

static inline skerry_value skerry_string(const char *text) {
    skerry_value made = {SKERRY_STRING, {0}};
    made.as.bytes.data = text;
    made.as.bytes.length = strlen(text);
    return made;
}

/* The error of a function: `return skerry_fail(result, "why");` */
static inline bool skerry_fail(skerry_value *result, const char *message) {
    *result = skerry_string(message);
    return false;
}

#ifdef __cplusplus
}
#endif

#endif
