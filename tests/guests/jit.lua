-- What a tracing compiler in the guest does to the processor below it: machine code is written, run,
-- patched and thrown away all the time. Prints one line a part; the same everywhere.
local bit = require("bit")
local ffi = require("ffi")
local rounds = tonumber(arg[1] or "1")

local function part(name, f)
  io.write(name, " ", tostring(f()), "\n")
  io.flush()
end

for round = 1, rounds do
  part("integers", function()
    local h = 0
    for i = 1, 3000000 do h = bit.bxor(bit.rol(h, 5), bit.band(i * 2654435761 % 4294967296, 0xffff)) end
    return h
  end)
  part("floats", function()
    local x, y = 0.5, 0
    for i = 1, 2000000 do x = 3.99 * x * (1 - x); y = y + math.sqrt(x) / i end
    return string.format("%.12f", y)
  end)
  part("branches", function()
    -- Side exits in turn: traces grow trees.
    local t = { 0, 0, 0, 0, 0, 0, 0 }
    local s = 12345
    for i = 1, 1000000 do
      s = (s * 1103515245 + 12345) % 2147483648
      local k = s % 7
      if k == 0 then t[1] = t[1] + 1 elseif k == 1 then t[2] = t[2] + s % 3
      elseif k == 2 then t[3] = bit.bxor(t[3], s) elseif k == 3 then t[4] = t[4] - 1
      elseif k == 4 then t[5] = t[5] + t[1] % 5 elseif k == 5 then t[6] = math.max(t[6], s) else t[7] = i end
    end
    return table.concat(t, ",")
  end)
  part("strings", function()
    local t = {}
    for i = 1, 40000 do t[#t + 1] = ("%x"):format(i * 7919):rep(i % 3 + 1) end
    local s = table.concat(t)
    local n = 0
    for a, b in s:gmatch("(%d)(%a)") do n = (n * 31 + a:byte() * 7 + b:byte()) % 1000003 end
    return n
  end)
  part("calls", function()
    local function fib(n) if n < 2 then return n end return fib(n - 1) + fib(n - 2) end
    return fib(30)
  end)
  part("foreign", function()
    local a = ffi.new("uint64_t[?]", 4096)
    for k = 1, 40 do for i = 0, 4095 do a[i] = a[i] * 6364136223846793005ULL + i + k end end
    local x = 0ULL
    for i = 0, 4095 do x = bit.bxor(x, a[i]) end
    return x
  end)
  part("new code", function()
    -- Functions made of text, each compiled, run hot and forgotten.
    local sum = 0
    for n = 1, 600 do
      local f = assert(load("local s = 0 for i = 1, 200 do s = s + (i * " .. n .. ") % " .. (n % 13 + 2) .. " end return s"))
      sum = sum + f()
      if n % 50 == 0 and jit.status() then jit.flush() end
    end
    return sum
  end)
  part("coroutines", function()
    local function gen(n) return coroutine.wrap(function() for i = 1, n do coroutine.yield(i * i % 97) end end) end
    local s = 0
    for v in gen(100000) do s = s + v end
    return s
  end)
end
