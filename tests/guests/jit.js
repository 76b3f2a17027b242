// What a JavaScript engine's compilers in the guest do to the processor below it: several tiers, in
// threads of their own, whose code is patched, thrown away where it guessed wrong, moved and made again.
// Regular expressions and WebAssembly have compilers too. Prints one line a part; every engine the same.
"use strict";
const say = typeof print === "function" ? print : console.log;
const given = typeof process === "object" ? process.argv[2] : arguments[0];
const rounds = Number(given || 1);
const part = (name, f) => say(name + " " + f());

// A module with one function: n => the sum of x over n steps of x = x * 1664525 + 1013904223, rotated.
const module_bytes = new Uint8Array([
  0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00,
  0x01, 0x06, 0x01, 0x60, 0x01, 0x7f, 0x01, 0x7f, // type 0: (i32) -> i32
  0x03, 0x02, 0x01, 0x00, // function 0 has type 0
  0x07, 0x05, 0x01, 0x01, 0x66, 0x00, 0x00, // export "f"
  0x0a, 0x33, 0x01, 0x31, 0x01, 0x02, 0x7f, // one body, two more locals: x and sum
  0x03, 0x40, // loop
  0x20, 0x01, 0x41, 0x8d, 0xcc, 0xe5, 0x00, 0x6c, // x * 1664525
  0x41, 0xdf, 0xe6, 0xbb, 0xe3, 0x03, 0x6a, 0x22, 0x01, // + 1013904223, kept as x
  0x20, 0x02, 0x41, 0x05, 0x77, // sum, rotated left by 5
  0x6a, 0x21, 0x02, // added, kept as sum
  0x20, 0x00, 0x41, 0x01, 0x6b, 0x22, 0x00, // n - 1, kept as n
  0x41, 0x00, 0x4a, 0x0d, 0x00, // again if n > 0
  0x0b, 0x20, 0x02, 0x20, 0x01, 0x73, 0x0b, // sum ^ x
]);

class Shape { constructor(a) { this.a = a; } area() { return this.a; } }
class Square extends Shape { area() { return this.a * this.a; } }
class Circle extends Shape { area() { return 3 * this.a * this.a; } }
class Other extends Shape { constructor(a) { super(a); this.b = a + 1; } area() { return this.a * this.b; } }

for (let round = 0; round < rounds; round++) {
  part("integers", () => {
    let h = 0;
    for (let i = 1; i <= 3000000; i++) h = ((h << 5 | h >>> 27) ^ Math.imul(i, 2654435761)) | 0;
    return h;
  });
  part("floats", () => {
    let x = 0.5, y = 0;
    for (let i = 1; i <= 2000000; i++) { x = 3.99 * x * (1 - x); y += Math.sqrt(x) / i; }
    return y.toFixed(10);
  });
  part("guesses", () => {
    // Compiled for small integers, then for doubles, strings, and both.
    const add = (a, b) => a + b;
    let s = 0;
    for (let i = 0; i < 200000; i++) s = add(s, i & 7);
    for (let i = 0; i < 200000; i++) s = add(s, 0.25);
    let t = "";
    for (let i = 0; i < 20000; i++) t = add(t, i % 10);
    for (let i = 0; i < 100000; i++) s = add(s, 0x7fffffff);
    return s + " " + t.length;
  });
  part("shapes", () => {
    const kinds = [Shape, Square, Circle, Other];
    let s = 0;
    for (let n = 1; n <= 4; n++) {
      const all = [];
      for (let i = 0; i < 1000; i++) all.push(new kinds[i % n](i % 50));
      for (let k = 0; k < 100; k++) for (const one of all) s += one.area();
    }
    return s;
  });
  part("arrays", () => {
    const a = new Uint32Array(4096), f = new Float64Array(4096);
    for (let k = 1; k <= 60; k++)
      for (let i = 0; i < 4096; i++) { a[i] = Math.imul(a[i], 1664525) + i + k; f[i] = f[i] * 0.5 + a[i]; }
    return a.reduce((x, y) => (x ^ y) >>> 0, 0) + " " + f.reduce((x, y) => x + y, 0).toFixed(3);
  });
  part("sorting", () => {
    const a = [];
    let s = 12345;
    for (let i = 0; i < 60000; i++) { s = (Math.imul(s, 1103515245) + 12345) >>> 0; a.push(s % 100003); }
    a.sort((x, y) => x - y);
    return a.filter((x, i) => i % 6000 === 0).join();
  });
  part("strings", () => {
    let t = "";
    for (let i = 1; i <= 30000; i++) t += (i * 7919).toString(16).repeat(i % 3 + 1);
    let n = 0;
    for (const m of t.matchAll(/(\d)([a-f]+)(?=\d)/g)) n = (n * 31 + m[2].length * 7 + m.index) % 1000003;
    return n + " " + t.replace(/a(b|c)?/g, (all, b) => (b || "-") + all.length).length;
  });
  part("calls", () => {
    const fib = (n) => n < 2 ? n : fib(n - 1) + fib(n - 2);
    return fib(29);
  });
  part("objects", () => {
    // Much that lives shortly, some that stays: the collector moves it, and corrects what is compiled.
    const map = new Map();
    for (let i = 0; i < 300000; i++) {
      const o = { key: "k" + i % 5000, value: { i, pair: [i, i + 1] } };
      if (i % 3 === 0) map.set(o.key, o.value);
    }
    let s = 0;
    for (const [k, v] of map) s = (s * 31 + k.length + v.pair[1]) % 1000003;
    return map.size + " " + s;
  });
  part("new code", () => {
    // Functions made of text, each compiled, run hot and forgotten.
    let sum = 0;
    for (let n = 1; n <= 400; n++) {
      const f = new Function("m", `let s = 0; for (let i = 1; i <= m; i++) s += (i * ${n}) % ${n % 13 + 2}; return s`);
      for (let k = 0; k < 10; k++) sum += f(400);
    }
    return sum;
  });
  part("exceptions", () => {
    const g = (i) => { if (i % 17 === 0) throw new Error("at " + i); return i; };
    let s = 0;
    for (let i = 1; i < 60000; i++) try { s += g(i); } catch (e) { s -= e.message.length; }
    return s;
  });
  part("generators", () => {
    function* gen(n) { for (let i = 1; i <= n; i++) yield i * i % 97; }
    let s = 0;
    for (const v of gen(200000)) s += v;
    return s;
  });
  part("big integers", () => {
    let x = 1n;
    for (let i = 1n; i <= 600n; i++) x *= i;
    return (x % 1000000000000000003n) + " " + x.toString().length;
  });
  part("WebAssembly", () => {
    const { f } = new WebAssembly.Instance(new WebAssembly.Module(module_bytes)).exports;
    let s = 0;
    for (let i = 1; i <= 300; i++) s = (s ^ f(i * 50)) | 0;
    return s;
  });
}
