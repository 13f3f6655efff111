"""The system calls that programs in the sandbox are refused, as a filter of the kernel (seccomp, classic BPF).

Refused with EPERM: new namespaces (`unshare`, `setns`, `clone` with their flags), mounting, tracing and reading other
processes, keys, kernel modules, `bpf`, `io_uring`, `userfaultfd` and `perf_event_open`: what programs of unit tests
never need and what kernels have been attacked through. So is memory that belongs to no process, which no limit counts:
shared memory and queues of System V, files of `memfd_create`. `clone3`, whose flags a filter cannot see, does not exist
(ENOSYS): the C library then takes `clone`. System calls of another architecture are refused, too.

Known for x86-64 and 64-bit ARM; on other machines there is no filter, and the namespaces and limits alone hold.
Reads and writes nothing.
"""

import errno
import struct

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in what a filter sees of a call
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
X32 = 0x40000000
SHARED = (425, 426, 427, 428, 429, 430, 431, 432, 438, 442, 447)  # io_uring, new mount calls, pidfd_getfd, memfd_secret
HIDDEN = {"x86_64": (29, 30, 68, 319), "aarch64": (194, 196, 186, 279)}  # shmget shmat msgget memfd_create
REFUSED: dict[str, tuple[int, int, tuple[int, ...]]] = {  # machine: architecture, clone, refused calls
    "x86_64": (
        0xC000003E,
        56,
        # ptrace pivot_root chroot mount umount2 init_module delete_module kexec_load add_key request_key keyctl
        # unshare perf_event_open name_to_handle_at open_by_handle_at setns process_vm_readv process_vm_writev
        # finit_module kexec_file_load bpf userfaultfd
        (101, 155, 161, 165, 166, 175, 176, 246, 248, 249, 250, 272, 298, 303, 304, 308, 310, 311, 313, 320, 321, 323),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        # umount2 mount pivot_root chroot unshare kexec_load init_module delete_module ptrace add_key request_key keyctl
        # perf_event_open name_to_handle_at open_by_handle_at setns process_vm_readv process_vm_writev finit_module bpf
        # userfaultfd kexec_file_load
        (39, 40, 41, 51, 97, 104, 105, 106, 117, 217, 218, 219, 241, 264, 265, 268, 270, 271, 273, 280, 282, 294),
    ),
}
CLONE3 = 435


def call_filter(machine: str) -> bytes | None:
    """Return the filter for a machine (`platform.machine()`) as bubblewrap's `--seccomp` reads it; None: none known."""
    if machine not in REFUSED:
        return None
    architecture, clone, refused = REFUSED[machine]
    no_permission, not_there = REFUSE | errno.EPERM, REFUSE | errno.ENOSYS
    program = [_step(LOAD, ARCHITECTURE), *_unless(JUMP_EQUAL, architecture, no_permission), _step(LOAD, NUMBER)]
    program += _if(JUMP_AT_LEAST, X32, no_permission) if machine == "x86_64" else []
    for number in (*refused, *HIDDEN[machine], *SHARED):
        program += _if(JUMP_EQUAL, number, no_permission)
    program += _if(JUMP_EQUAL, CLONE3, not_there)
    # clone: its flags decide; the two steps after the first jump are left out for other calls.
    program += [_step(JUMP_EQUAL, clone, 1, 0), _step(RETURN, ALLOW), _step(LOAD, FIRST_ARGUMENT)]
    return b"".join([*program, *_if(JUMP_ANY, NEW_NAMESPACES, no_permission), _step(RETURN, ALLOW)])


def _if(kind: int, value: int, result: int) -> list[bytes]:
    return [_step(kind, value, 0, 1), _step(RETURN, result)]


def _unless(kind: int, value: int, result: int) -> list[bytes]:
    return [_step(kind, value, 1, 0), _step(RETURN, result)]


def _step(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, when_true, when_false, value)
