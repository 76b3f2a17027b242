#!/usr/bin/env bash
# Servers of Debian's packages in guests, driven from the host through published ports by their own clients:
# nginx (ab), redis (redis-benchmark, redis-cli), PostgreSQL (pgbench, psql), a Python asyncio server
# (Python). Each answers a thousand requests or more without an error. Then apt-get in a guest updates from
# a repository on the host's loopback interface, which a rule allows, and downloads a package.
#
#   tests/servers.sh [--requests 1000] [--only "nginx redis postgres python apt"]
#
# Needs `cargo build --release`, ab (apache2-utils), redis-tools, postgresql-client with pgbench
# (postgresql-contrib or postgresql), python3, dpkg-dev's dpkg-scanpackages or none (the index is written
# here), and, the first time, apt-get to download Debian's packages into
# ${XDG_CACHE_HOME:-~/.cache}/skerry-tests (nothing is installed).
set -u
requests=1000 only="nginx redis postgres python apt"
while [ $# -gt 0 ]; do
  case $1 in
    --requests) requests=$2; shift 2;;
    --only) only=$2; shift 2;;
    *) echo "unknown option $1" >&2; exit 2;;
  esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
skerry=${SKERRY:-${CARGO_TARGET_DIR:-$root/target}/release/skerry}
[ -x "$skerry" ] || { echo "no $skerry: cargo build --release first" >&2; exit 2; }
cache=${XDG_CACHE_HOME:-$HOME/.cache}/skerry-tests/servers
guest=$cache/rootfs
if [ ! -e "$cache/complete" ]; then
  rm -rf "$cache"; mkdir -p "$cache/archives/partial" "$guest"/usr/{bin,sbin,lib,lib64}
  # As if nothing were installed, so that every dependency is among what is downloaded.
  : > "$cache/status"
  apt-get -q -y -o Debug::NoLocking=1 -o "Dir::State::status=$cache/status" -o APT::Sandbox::User= \
    -o "Dir::Cache::archives=$cache/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
    -o APT::Install-Recommends=false --download-only install \
    nginx-light redis-server postgresql python3 apt bash coreutils sed grep busybox-static hello \
    >&2 || { echo "no packages" >&2; exit 2; }
  for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$guest/$folder"; done
  for package in "$cache"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$guest" ||
      exit 2
  done
  mkdir -p "$cache/packages"; mv "$cache"/archives/hello_*.deb "$cache/packages/"
  rm -rf "$cache/archives" "$guest"/usr/share/{doc,locale,man,info}
  ln -sf bash "$guest/bin/sh"
  mkdir -p "$guest"/{tmp,run,proc,sys,dev,root} "$guest"/etc/apt/{preferences.d,apt.conf.d} \
    "$guest"/var/{lib/dpkg,lib/apt/lists/partial,cache/apt/archives/partial,log/nginx,lib/nginx}
  : > "$guest/var/lib/dpkg/status"
  printf 'root:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/:/bin/sh\npostgres:x:105:105::/tmp:/bin/sh\n' \
    > "$guest/etc/passwd"
  printf 'root:x:0:\nwww-data:x:33:\npostgres:x:105:\n' > "$guest/etc/group"
  touch "$cache/complete"
fi

export XDG_DATA_HOME
XDG_DATA_HOME=$(mktemp -d)
failures=0 helper=
end() {
  "$skerry" ps -q | xargs -r "$skerry" kill > /dev/null 2>&1
  [ -n "$helper" ] && kill "$helper" 2> /dev/null
  rm -rf "$XDG_DATA_HOME"
}
trap end EXIT

# The options and the command of a machine called $1.
start() {
  local name=$1; shift
  "$skerry" run -d --hypervisor soft --name "$name" "$@" > /dev/null || exit 1
}
port() { "$skerry" port "$1" "$2" | sed 's/.*://'; }
# Waits until a command succeeds.
await() {
  for _ in $(seq 300); do "$@" > /dev/null 2>&1 && return; sleep 0.2; done
  echo "it doesn't come up: $*" >&2; return 1
}
result() {
  local name=$1 good=$2; shift 2
  if [ "$good" = yes ]; then echo "$name: $*"; else echo "$name: FAILED: $*"; failures=$((failures + 1)); fi
}
wants() { case " $only " in *" $1 "*) return 0;; esac; return 1; }

if wants nginx; then
  start web -p 127.0.0.1::80 "dir:$guest" sh -c 'mkdir -p /var/www; head -c 10000 /dev/urandom > /var/www/page
    printf "user www-data; daemon off; worker_processes 1; events {} http { access_log off; server { listen 80; root /var/www; } }" \
      > /tmp/nginx.conf; exec nginx -c /tmp/nginx.conf'
  at=$(port web 80)
  await curl -fsS "http://127.0.0.1:$at/page"
  said=$(ab -q -n "$requests" -c 8 "http://127.0.0.1:$at/page" 2>&1)
  grep -q "^Complete requests: *$requests\$" <<< "$said" && grep -q '^Failed requests: *0$' <<< "$said" &&
    ! grep -q 'Non-2xx' <<< "$said" && good=yes || good=no
  result nginx $good "$requests requests, $(sed -n 's/^Requests per second: *//p' <<< "$said")"
fi

if wants redis; then
  start redis -p 127.0.0.1::6379 "dir:$guest" redis-server --protected-mode no --save '' --dir /tmp
  at=$(port redis 6379)
  await redis-cli -p "$at" ping
  said=$(redis-benchmark -p "$at" -n "$requests" -c 8 -t set,get,incr --csv 2>&1)
  counted=$(redis-cli -p "$at" get counter:__rand_int__)
  [ "$(grep -c '^"\(SET\|GET\|INCR\)"' <<< "$said")" = 3 ] && [ "$counted" = "$requests" ] &&
    ! grep -qi error <<< "$said" && good=yes || good=no
  result redis $good "3 x $requests requests, per second: $(awk -F'"' '/^"(SET|GET|INCR)"/ {printf "%s %s  ", $2, $4}' <<< "$said")"
fi

if wants postgres; then
  start db --memory 512M -p 127.0.0.1::5432 "dir:$guest" sh -c 'bin=$(echo /usr/lib/postgresql/*/bin)
    mkdir -p /tmp/db /run/postgresql; chown postgres:postgres /tmp/db /run/postgresql
    run() { busybox su postgres -c "$*"; }
    run $bin/initdb -D /tmp/db -A trust > /tmp/log 2>&1
    echo "host all all 0.0.0.0/0 trust" >> /tmp/db/pg_hba.conf
    run exec $bin/postgres -D /tmp/db -k /tmp -h 0.0.0.0'
  at=$(port db 5432)
  export PGHOST=127.0.0.1 PGPORT=$at PGUSER=postgres PGDATABASE=postgres
  if await psql -qc 'select 1'; then
    pgbench -q -i -s 1 > /dev/null 2>&1
    said=$(pgbench -n -c 4 -t $(((requests + 3) / 4)) 2>&1)
    rows=$(psql -Atc 'select count(*) from pgbench_history')
    [ "$rows" -ge "$requests" ] && grep -q 'failed transactions: 0 ' <<< "$said" && good=yes || good=no
    result postgres $good "$rows transactions, $(sed -n 's/^tps = //p' <<< "$said" | tail -n 1)"
  else
    "$skerry" logs db | tail -5
    result postgres no "no server"
  fi
fi

if wants python; then
  cat > "$XDG_DATA_HOME/server.py" <<'END'
import asyncio
async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(line[::-1].strip() + b"\n")
        await writer.drain()
    writer.close()
async def main():
    async with await asyncio.start_server(serve, "0.0.0.0", 7) as server:
        await server.serve_forever()
asyncio.run(main())
END
  start echo -p 127.0.0.1::7 "dir:$guest" python3 -c "$(cat "$XDG_DATA_HOME/server.py")"
  at=$(port echo 7)
  said=$(python3 - "$at" "$requests" <<'END'
import asyncio, sys, time
port, requests = map(int, sys.argv[1:])
async def ask(lines):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    good = 0
    for number in lines:
        text = b"request %d" % number
        writer.write(text + b"\n")
        good += await reader.readline() == text[::-1] + b"\n"
    writer.close()
    return good
async def main():
    for _ in range(300):
        try:
            if await asyncio.wait_for(ask([0]), 5) == 1: break
        except (OSError, asyncio.TimeoutError): pass
        await asyncio.sleep(0.2)
    begun = time.time()
    good = sum(await asyncio.gather(*[ask(range(n, requests, 10)) for n in range(10)]))
    print(good, round(good / (time.time() - begun)))
asyncio.run(main())
END
)
  [ "${said%% *}" = "$requests" ] && good=yes || good=no
  result python $good "${said%% *} of $requests right answers, ${said##* } a second"
fi

if wants apt; then
  repository=$XDG_DATA_HOME/repository; mkdir -p "$repository"; cp "$cache"/packages/*.deb "$repository/"
  (cd "$repository" && for package in *.deb; do
    dpkg-deb -f "$package"
    echo "Filename: ./$package"; echo "Size: $(stat -c %s "$package")"
    echo "SHA256: $(sha256sum < "$package" | cut -d' ' -f1)"; echo
  done > Packages)
  python3 -u -m http.server --bind 127.0.0.1 --directory "$repository" 0 > "$XDG_DATA_HOME/http" 2>&1 & helper=$!
  await grep -q port "$XDG_DATA_HOME/http"
  at=$(sed -n 's/.*port \([0-9]*\).*/\1/p' "$XDG_DATA_HOME/http")
  said=$("$skerry" run --hypervisor soft --network-allow "127.0.0.1:$at" "dir:$guest" sh -c "cd /tmp
    echo 'deb [trusted=yes] http://10.0.2.2:$at ./' > /etc/apt/sources.list
    apt-get -q -o APT::Sandbox::User=root -o APT::Architecture=amd64 update 2>&1 &&
    apt-get -q -o APT::Sandbox::User=root -o APT::Architecture=amd64 download hello 2>&1 && sha256sum hello_*.deb")
  expected=$(cd "$repository" && sha256sum hello_*.deb | cut -d' ' -f1)
  grep -q "$expected" <<< "$said" && good=yes || good=no
  [ $good = no ] && echo "$said"
  result apt $good "updated and downloaded hello, $(stat -c %s "$repository"/hello_*.deb) bytes"
fi
[ "$failures" = 0 ] && echo "servers: all good"
exit "$failures"
