import json, sys

data = {
    "users": [
        {
            "id": n,
            "name": "user %d" % n,
            "score": n * 1.25,
            "tags": ["a" * (n % 7), "b\n", "\u00e9"],
            "active": n % 3 == 0,
            "none": None,
        }
        for n in range(400)
    ]
}
size = 0
for turn in range(int(sys.argv[1])):
    text = json.dumps(data, sort_keys=turn % 2 == 0, indent=1 if turn % 4 == 0 else None)
    size += len(text)
    data = json.loads(text)
print(size, data["users"][7])
