import math, sys

SUN = 4 * math.pi * math.pi
YEAR = 365.24
bodies = [
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], SUN],
    [[4.84, -1.16, -0.10], [0.0017 * YEAR, 0.0077 * YEAR, -0.00007 * YEAR], 0.00095 * SUN],
    [[8.34, 4.12, -0.40], [-0.0028 * YEAR, 0.0050 * YEAR, 0.00002 * YEAR], 0.00029 * SUN],
    [[12.89, -15.11, -0.22], [0.0030 * YEAR, 0.0024 * YEAR, -0.00003 * YEAR], 0.00004 * SUN],
    [[15.38, -25.92, 0.18], [0.0027 * YEAR, 0.0016 * YEAR, -0.0001 * YEAR], 0.00005 * SUN],
]
pairs = [(a, b) for i, a in enumerate(bodies) for b in bodies[i + 1:]]


def advance(steps, dt):
    for _ in range(steps):
        for (p, v, m), (q, w, n) in pairs:
            x = p[0] - q[0]
            y = p[1] - q[1]
            z = p[2] - q[2]
            near = dt * (x * x + y * y + z * z) ** -1.5
            a = m * near
            b = n * near
            v[0] -= x * b
            v[1] -= y * b
            v[2] -= z * b
            w[0] += x * a
            w[1] += y * a
            w[2] += z * a
        for p, v, _ in bodies:
            p[0] += dt * v[0]
            p[1] += dt * v[1]
            p[2] += dt * v[2]


advance(int(sys.argv[1]), 0.01)
print(["%.9f" % x for body in bodies for x in body[0]])
