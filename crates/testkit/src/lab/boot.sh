# The first process of a host. Arguments: the host's name, then pairs of a file or directory on the lab's floor and
# the place where the host has it.
set -eu
exec 2>&1
umask 022
read -r pid _ < /proc/self/stat
echo "pid $pid"

name=$1
shift
echo "$name" > /proc/sys/kernel/hostname
ipv6=/proc/sys/net/ipv6/conf/default/disable_ipv6
if [ -e $ipv6 ]; then echo 1 > $ipv6; fi
# What Linux takes where nobody has chosen another; bbr, which some machines choose, paces what it sends with a timer for each
# packet. A network namespace may choose only what the kernel allows everybody; where cubic is not (a kernel whose built-in default is
# another), the host keeps what there is.
if grep -qsw cubic /proc/sys/net/ipv4/tcp_allowed_congestion_control; then
    echo cubic > /proc/sys/net/ipv4/tcp_congestion_control
fi

root=/mnt
own=/run/hosts/$name
mount -t overlay -o "lowerdir=/,upperdir=$own/overlay/upper,workdir=$own/overlay/scratch" "$name" $root
mount --all --fstab "$own/fstab"
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/fuse $root/dev/
ln -s pts/ptmx $root/dev/ptmx
ln -s /proc/self/fd $root/dev/fd
ln -s /proc/self/fd/0 $root/dev/stdin
ln -s /proc/self/fd/1 $root/dev/stdout
ln -s /proc/self/fd/2 $root/dev/stderr
while [ $# -gt 0 ]; do
    at=$root$2
    if [ -d "$1" ]; then mkdir -p "$at"; else mkdir -p "${at%/*}" && : >> "$at"; fi
    mount --bind "$1" "$at"
    shift 2
done
mkdir $root/run/sshd
cd $root
pivot_root . .
umount -l .
cd /

echo ready
# With SIGCHLD ignored the kernel reaps what is orphaned here; the shell itself cannot ignore it.
exec env --ignore-signal=CHLD sleep infinity < /dev/null > /dev/null 2>&1
