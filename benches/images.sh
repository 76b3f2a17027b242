#!/bin/bash
# Makes the guest that bench-workloads measures in: a folder with Debian packages unpacked, for the
# native runs, and the same as a disk for Skerry and QEMU.
#
#   benches/images.sh DIR
#
# Writes DIR/rootfs and DIR/rootfs.ext4 (some 400 MB each). Packages come from where this host's own
# come from (apt-get update first); nothing is installed on it, and root isn't needed. Needs apt-get,
# dpkg-deb, mke2fs.
set -euo pipefail

packages=(
    busybox-static coreutils dash grep gzip
    python3-minimal libpython3-stdlib
    gcc libc6-dev tcc
)

if [ $# -ne 1 ]; then
    echo "usage: images.sh DIR" >&2
    exit 125
fi
mkdir -p "$1"
cache=$(realpath "$1")
root=$cache/rootfs

# As if nothing were installed, so that every dependency is among what is downloaded.
mkdir -p "$cache/apt/archives/partial"
: > "$cache/apt/status"
apt() {
    apt-get -q -o Debug::NoLocking=1 -o "Dir::State::status=$cache/apt/status" \
        -o "Dir::Cache::archives=$cache/apt/archives" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" \
        -o APT::Sandbox::User= -o APT::Install-Recommends=false "$@"
}
rm -f "$cache"/apt/archives/*.deb
apt -y --download-only install "${packages[@]}" >&2

rm -rf "$root" "$cache/rootfs.ext4"
mkdir -p "$root"
for deb in "$cache"/apt/archives/*.deb; do
    # Some need /bin and so on to be links into /usr, as they are where Debian is installed.
    if [ ! -e "$root/usr" ]; then
        mkdir -p "$root"/usr/{bin,sbin,lib,lib64}
        for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$root/$folder"; done
    fi
    dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink --no-same-owner -C "$root"
done
rm -rf "$root"/usr/share/{doc,locale,man,info} "$root/var/lib/dpkg"
mkdir -p "$root"/{dev,proc,sys,tmp,root}
chmod 1777 "$root/tmp"
# What the packages' own scripts would have made.
ln -sf dash "$root/bin/sh"
# Compiled by the guest's own Python, for the disk is read-only there.
python=$(echo "$root"/usr/bin/python3.*)
library=$root/usr/lib/${python##*/}
env -u PYTHONDONTWRITEBYTECODE "PYTHONHOME=$root/usr" \
    "$root/lib64/ld-linux-x86-64.so.2" --library-path "$root/usr/lib/x86_64-linux-gnu" \
    "$python" -S -m compileall -q --invalidation-mode unchecked-hash -s "$root" "$library" >&2 || true
[ -d "$library/json/__pycache__" ] || {
    echo "images.sh: Python's library can't be compiled" >&2
    exit 125
}

size=$(du -sm "$root" | cut -f1)
mke2fs -q -t ext4 -O ^has_journal -m 0 -E root_owner=0:0 -d "$root" "$cache/rootfs.ext4" $((size + size / 4 + 32))M
(cd "$cache/apt/archives" && ls ./*.deb | sed 's,^\./,,') > "$cache/packages"
rm -rf "$cache/apt"
echo "$cache: $(wc -l < "$cache/packages") packages, $size MiB"
