import re, sys

words = ["alpha", "beta42", "x=1", "mail@example.org", "2026-11-21", "--flag", "0x1F", "tail;"]
text = " ".join(words[(n * n + n // 3) % len(words)] + str(n % 10) for n in range(2000))
patterns = [
    re.compile(p)
    for p in (
        r"\b\w+@\w+\.org\d",
        r"(\d{4})-(\d\d)-(\d+)",
        r"0x[0-9A-F]+",
        r"(?:alpha|beta\d+)(?=\s)",
        r"--(\w+?)\d",
        r"[a-z]+=\d+|tail;",
    )
]
found = 0
for _ in range(int(sys.argv[1])):
    for pattern in patterns:
        found += sum(1 for _ in pattern.finditer(text))
    found += len(re.sub(r"(\w)(\d)", r"\2\1", text)) + len(re.split(r"[ ;]+", text))
print(found)
