"""Programs that try to get out of the sandbox, or to hold it up; run as a script, or by a test.

As a script (`python sandbox_attacks.py`) it needs only the standard library and the two files of the sandbox, so that a
plain user without this environment runs it too; it prints one line for each attack that succeeds.
"""

import os
import sys
import time
from pathlib import Path

from lit_puzzle.environments.sandbox import check_sandbox, run_program
from lit_puzzle.environments.sandbox_limits import SandboxLimits

# Small, for these programs take whatever they get.
LIMITS = SandboxLimits(
    cpu_seconds=1,
    wall_seconds=5.0,
    total_seconds=20.0,
    memory_bytes=160 << 20,
    processes=4,
    output_bytes=1 << 16,
    file_bytes=1 << 20,
)
SECRET = "a secret of the host"

# name: (program, statuses that are right, text that must not be printed, text that must be)
ATTACKS: dict[str, tuple[str, set[str], str, str]] = {
    "fork bomb": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        {"time limit", "memory limit"},
        "",
        "",
    ),
    "processes": (
        "import os\nn = 0\nfor _ in range(50):\n  try:\n    if os.fork() == 0:\n      import time; time.sleep(60)\n"
        "    n += 1\n  except OSError: pass\nprint('few' if n <= 5 else 'many')",
        {"ok"},
        "many",
        "few",
    ),
    "threads": (
        "import threading, time\nn = 0\nfor _ in range(50):\n  try:\n    threading.Thread(target=time.sleep, "
        "args=(60,), daemon=True).start(); n += 1\n  except RuntimeError: pass\n"
        "print('few' if n <= 5 else 'many', flush=True)\n"
        "import os; os._exit(0)",
        {"ok"},
        "many",
        "few",
    ),
    "memory of one process": ("a = bytearray(1 << 30)", {"exit code 1"}, "", ""),
    "memory of many": (
        "import os, time\nfor _ in range(3):\n  if os.fork() == 0:\n    b = bytearray(120 << 20); time.sleep(60)\n"
        "time.sleep(60)",
        {"memory limit", "time limit"},
        "",
        "",
    ),
    "output flood": ("import os\nwhile True: os.write(1, b'x' * 10000)", {"output limit"}, "xxx", ""),
    "error flood": ("import os\nfor _ in range(1000): os.write(2, b'x' * 10000)\nprint('done')", {"ok"}, "", "done"),
    "large file": ("open('/tmp/x', 'w').write('a' * (8 << 20))", {"exit code 1", "signal 25"}, "", ""),
    "full disk": (
        "try:\n  for n in range(100): open(f'/tmp/{n}', 'w').write('a' * (900 << 10))\nexcept OSError: print('full')",
        {"ok"},
        "",
        "full",
    ),
    "computing": ("while True: pass", {"time limit"}, "", ""),
    "sleeping": ("import time\ntime.sleep(60)", {"time limit"}, "", ""),
    "C code": ("10 ** 10 ** 10", {"time limit"}, "", ""),
    "files of the host": (
        "import os\nfor p in ['/root', '/home', '/work', '/proc', '/sys', '/etc/passwd', '/var', 'SECRET']:\n"
        "  if os.path.exists(p): print('seen', p)\ntry: print(open('SECRET').read())\nexcept OSError: print('closed')",
        {"ok"},
        "seen",
        "closed",
    ),
    "links": (
        "import os\nos.symlink('SECRET', '/tmp/l')\nos.symlink('/proc/1/root', '/tmp/r')\n"
        "for p in ['/tmp/l', '/tmp/r/etc', '/dev/fd/3', '/tmp/../../SECRET']:\n"
        "  try: print('seen', open(p).read())\n  except OSError: pass\nprint('closed')",
        {"ok"},
        "seen",
        "closed",
    ),
    "writing outside": (
        "import os\nfor p in ['/x', '/usr/x', '/etc/x', '/dev/x/y', '/bin/x', '/python/x']:\n"
        "  try: open(p, 'w'); print('written', p)\n  except OSError: pass\nprint('closed')",
        {"ok"},
        "written",
        "closed",
    ),
    "network": (
        "import socket\nfor a in [('1.1.1.1', 80), ('127.0.0.1', PORT)]:\n  try: socket.create_connection(a, 1); "
        "print('connected', a)\n  except OSError: pass\nprint('closed')",
        {"ok"},
        "connected",
        "closed",
    ),
    "environment": ("import os\nprint(sorted(os.environ))", {"ok"}, "SANDBOX_TEST", "HOME"),
    "becoming root": (
        "import os, ctypes\ntry:\n  os.setuid(0); print('root', os.getuid())\nexcept OSError: pass\n"
        "libc = ctypes.CDLL(None)\nprint('mounted' if libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0 else 'closed')",
        {"ok"},
        "mounted",
        "closed",
    ),
    "namespaces and tracing": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor flag in (0x10000000, 0x20000, 0x40000000):\n"
        "  if libc.unshare(flag) == 0: print('namespace')\n"
        "for call in (lambda: libc.ptrace(16, os.getppid(), 0, 0), lambda: libc.syscall(425, 8, 0)):\n"
        "  if call() >= 0: print('namespace')\nprint('closed')",
        {"ok"},
        "namespace",
        "closed",
    ),
    "memory of no process": (  # shared memory and queues of System V, files of memfd_create: no limit counts them
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nif libc.shmget(0, 1 << 20, 0o1600) >= 0: print('hidden')\n"
        "if libc.msgget(0, 0o1600) >= 0: print('hidden')\n"
        "try: os.memfd_create('file'); print('hidden')\nexcept OSError: print('closed')",
        {"ok"},
        "hidden",
        "closed",
    ),
    "signals to all": (
        "import os, signal\nos.kill(-1, signal.SIGKILL)\nprint(1)",
        {"sandbox ended", "signal 9"},
        "",
        "",
    ),
    "signal to the parent": ("import os\nos.kill(os.getppid(), 9)\nprint(1)", {"sandbox ended"}, "", ""),
    "stopping the parent": ("import os\nos.kill(os.getppid(), 19)\nprint(1)", {"time limit"}, "", ""),
    "signals to the host": (
        "import os\nfor p in [HOST]:\n  try: os.kill(p, 9); print('sent')\n  except OSError: pass\nprint('closed')",
        {"ok"},
        "sent",
        "closed",
    ),
    "leaving something running": (
        "import os\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    import time; time.sleep(3600)\n"
        "print('done')",
        {"ok", "time limit"},
        "",
        "",
    ),
    "deep recursion": ("def f(): f()\nf()", {"exit code 1", "signal 11"}, "", ""),
    "a crash": ("import ctypes\nctypes.string_at(0)", {"signal 11"}, "", ""),
    "no program": ("this is no python", {"exit code 1"}, "", ""),
    "nested brackets": ("(" * 5000 + ")" * 5000, {"exit code 1", "signal 11"}, "", ""),
}


def attack(name: str, secret: Path, port: int) -> str:
    """Run an attack and return what is wrong with how it ended; nothing, if all is right."""
    program, statuses, never, always = ATTACKS[name]
    program = program.replace("SECRET", str(secret)).replace("PORT", str(port)).replace("HOST", str(os.getpid()))
    (outcome,) = list(run_program(program, [""], LIMITS))
    if outcome.status not in statuses:
        return f"{name}: {outcome}"
    if SECRET in outcome.output or (never and never in outcome.output) or always not in outcome.output:
        return f"{name}: printed {outcome.output[:200]!r}"
    return ""


def main(secret: Path) -> int:
    """Run all attacks."""
    os.environ["SANDBOX_TEST"] = SECRET
    check_sandbox()
    begun, failed = time.monotonic(), [line for name in ATTACKS if (line := attack(name, secret, 9))]
    print("\n".join([*failed, f"{len(ATTACKS)} attacks, {len(failed)} succeeded, uid {os.getuid()}"]))
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
