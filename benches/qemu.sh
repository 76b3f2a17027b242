#!/bin/bash
# Unpacks a newer release's QEMU, with the libraries that it needs, without installing anything.
#
#   benches/qemu.sh DIR [SUITE]        SUITE: a Debian suite [default: trixie]
#
# Writes DIR/qemu-system-x86_64, for bench-workloads' --qemu. The packages come from the archive that
# this host's own Debian packages come from. Root isn't needed. Needs apt-get, dpkg-deb and Debian's
# archive keys (debian-archive-keyring).
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: qemu.sh DIR [SUITE]" >&2
    exit 125
fi
mkdir -p "$1"
cache=$(realpath "$1")
suite=${2-trixie}
archive=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1)
if [ -z "$archive" ]; then
    echo "qemu.sh: this host's packages don't come from Debian" >&2
    exit 125
fi

apt=$cache/apt
mkdir -p "$apt"/{lists/partial,archives/partial}
: > "$apt/status"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
for part in ${suite%-backports} $suite; do
    echo "deb [signed-by=$keys] $archive $part main"
done | sort -u > "$apt/sources.list"
run() {
    apt-get -q -o Debug::NoLocking=1 -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=- \
        -o "Dir::State::lists=$apt/lists" -o "Dir::State::status=$apt/status" \
        -o "Dir::Cache::archives=$apt/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o APT::Sandbox::User= -o APT::Install-Recommends=false "$@" >&2
}
run update
run -y --download-only -t "$suite" install qemu-system-x86

rm -rf "$cache/root"
mkdir -p "$cache/root"
for deb in "$apt"/archives/*.deb; do dpkg-deb -x "$deb" "$cache/root"; done
rm -rf "$apt"

# Its own loader and libraries, for this host's may be older.
cat > "$cache/qemu-system-x86_64" <<END
#!/bin/sh
root='$cache/root'
exec "\$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "\$root/usr/lib/x86_64-linux-gnu" \\
    "\$root/usr/bin/qemu-system-x86_64" -L "\$root/usr/share/qemu" -L "\$root/usr/share/seabios" "\$@"
END
chmod 755 "$cache/qemu-system-x86_64"
"$cache/qemu-system-x86_64" --version | head -n 1
