# What POSIX has files do, in the manner of pjdfstest: run in a directory, print what each call says.
# Two file systems that behave the same print the same.
cd "$1" || exit 1
umask 022
n=0
# t COMMAND...: runs it, prints its number, its status and its error.
t() { n=$((n + 1)); out=$("$@" 2>&1); echo "$n $*: $? $out"; }
# u COMMAND: the same as user 1000, by a shell.
u() { n=$((n + 1)); out=$(su -s /bin/sh demo -c "cd '$PWD' && { $1; }" 2>&1); echo "$n demo: $1: $? $out"; }
# s FILE...: what stat says of them.
s() { for f in "$@"; do n=$((n + 1)); echo "$n $(stat -c '%n %F %a %u:%g %h %s' "$f" 2>&1)"; done; }

# mkdir, rmdir
t mkdir d; t mkdir d; t mkdir none/d; t rmdir d; t rmdir d; mkdir -p d/e; t rmdir d; touch f; t rmdir f; t mkdir f/x
t mkdir -m 1777 sticky; t mkdir -m 700 private; s sticky private; t rmdir d/e d
# names: the longest, and one more
long=$(printf '%0255d' 0); t touch $long; t touch ${long}0; t rm $long
# open, create, unlink
t cat none; t cat none/f; t cat f/x; t rm none; t unlink sticky; t rm private
echo one > f; s f; (set -C; echo two > f) 2>&1 | sed 's/.*: //'; t cat f
# links
t ln f l; s f l; t ln f l; t ln none x; t ln d x; t ln sticky x; t rm f; s l; t cat l; t mv l f
t ln -s f sl; t ln -s f sl; s sl; t cat sl; t readlink sl; t ln -s loop loop; t cat loop; t ln -s none dangling; t cat dangling
t ln -s / up; t cat up/none; s up; t chmod 600 sl; s f sl; t ln sl sl2; s sl2
# rename
echo two > g; t mv f g; t cat g; t mv none x; mkdir a b; touch b/in; t busybox mv -T a b; t mv a b; s b/a
mkdir e1 e2; t busybox mv -T e1 e2; t mv g b; t mv b/g .; t mv b b/a; touch f1; t busybox mv -T e2 f1; t busybox mv -T f1 e2; s e2 f1
# chmod, chown, and who may
touch own; t chmod 4755 own; s own; t chown 1000:1000 own; s own; t chmod 6755 own; s own; echo x >> own; s own
u 'echo y >> own'; s own; t chown 0:0 own; t chmod 644 own; s own
u 'chmod 600 own'; u 'chown demo own'; u 'echo z > own'; u 'rm own'; u 'touch -d 2001-01-01 own'; u 'cat own'
t chmod 777 .; u 'echo mine > theirs'; s theirs; u 'chmod 640 theirs'; u 'chown 0 theirs'; u 'chgrp 0 theirs'; u 'chgrp demo theirs'; s theirs
u 'ls private'; u 'cat private/x'; u 'mkdir private/x'; u 'touch sticky/mine'; touch sticky/roots; u 'rm -f sticky/roots'; u 'mv sticky/roots sticky/x'; u 'rm sticky/mine'
u 'ln own hard'; u 'ln -s own soft'; u 'mv private moved'; u 'rmdir private'; u 'mkdir sub && chmod 2770 sub'; s sub
t mkdir -m 2777 setgid; t chgrp 1000 setgid; t chmod 2777 setgid; t touch setgid/f; t mkdir setgid/d; s setgid setgid/f setgid/d
u 'touch setgid/g'; s setgid/g
# truncate, sparse files
t truncate -s 100000 big; s big; t truncate -s 10 big; s big; t truncate -s 5 none/x; t truncate -s 0 b; u 'truncate -s 0 big'
printf abcdef > o; printf XY | dd of=o bs=1 seek=2 conv=notrunc 2>/dev/null; t cat o; printf tail >> o; t cat o
dd if=/dev/zero of=hole bs=1 count=1 seek=1048575 2>/dev/null; s hole; t cmp -n 1048576 hole /dev/zero
t fallocate -l 4096 pre; s pre
# times
t touch -d '2001-02-03 04:05:06' o; t stat -c '%Y %X' o; t touch -h -d '2002-02-03 04:05:06' sl; t stat -c %Y sl; t stat -c %Y o
# special files
t mkfifo fifo; s fifo; (echo through > fifo &) ; t cat fifo; t mv fifo fifo2; t rm fifo2
# a file that is open and has no name any more
exec 3<> gone; echo still >&3; rm gone; t ls gone; exec 3<&-
(echo kept > keep; exec 4< keep; rm keep; mkdir keep; cat <&4)
# moved while open
(echo moved > mv1; exec 5>> mv1; mv mv1 mv2; echo more >&5; cat mv2)
# what is there in the end
n=0; find . | sort | while read -r f; do s "$f"; done
