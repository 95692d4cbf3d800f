# measure.py REPORT CMD...: runs CMD, waits for all its descendants (detached ones too, being their subreaper),
# writes the kernel's figures of the whole tree to REPORT as JSON and ends with CMD's exit code.
# A process's I/O counters include those of the children that it has waited for (proc(5), kernel/exit.c).
import ctypes, json, os, resource, sys, time

PR_SET_CHILD_SUBREAPER = 36
if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
    sys.exit("cannot become a subreaper")


def io_counters():
    return {name: int(value) for name, value in (line.split(": ") for line in open("/proc/self/io"))}


before, begin, status, first_end = io_counters(), time.monotonic(), None, None
started = time.time()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
while True:
    try:
        pid, result = os.wait()
    except ChildProcessError:
        break
    if pid == child:
        status, first_end = result, time.monotonic()
after, cpu = io_counters(), resource.getrusage(resource.RUSAGE_CHILDREN)
usage = {name: after[name] - before[name] for name in ("rchar", "wchar", "read_bytes", "write_bytes")}
usage.update(started=started, seconds=first_end - begin, seconds_of_all=time.monotonic() - begin, user=cpu.ru_utime, system=cpu.ru_stime)
with open(sys.argv[1], "w") as report:
    json.dump(usage, report)
code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
