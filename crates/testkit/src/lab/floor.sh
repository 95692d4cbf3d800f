# The first process of a lab: gives the lab a view of the machine of its own, then lives as long as its standard
# input. Arguments: what the hosts share of the machine.
set -eu
exec 2>&1
umask 022
read -r pid _ < /proc/self/stat
echo "pid $pid"

ipv6=/proc/sys/net/ipv6/conf/all/disable_ipv6
if [ -e $ipv6 ]; then echo 1 > $ipv6; fi

# The new root goes over /sys, where nothing to share can lie. It holds the root file system alone: a mount of the
# machine that was kept here could not be unmounted there.
root=/sys
mount --bind / $root
mount --bind /proc $root/proc
mount --bind /dev $root/dev
mount -t sysfs sysfs $root/sys
mount -t tmpfs -o mode=755 lab $root/run
mkdir $root/run/shares
number=0
for share; do
    at=$root/run/shares/$number
    if [ -d "$share" ]; then mkdir "$at"; else : > "$at"; fi
    mount --bind "$share" "$at"
    mount -o remount,bind,ro "$at"
    number=$((number + 1))
done
mount -o remount,bind,ro $root
cd $root
pivot_root . .
umount -l .
cd /

echo ready
# With SIGCHLD ignored the kernel reaps what is orphaned here; the shell itself cannot ignore it.
exec env --ignore-signal=CHLD cat > /dev/null
