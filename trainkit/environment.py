"""Who launched this process, and which of the processes of a run it is: read from the environment, in this order.

launcher   how it is recognised                  what it says
--------   --------------------                  ------------
torchrun   RANK and WORLD_SIZE                   LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK (or NODE_RANK),
                                                 GROUP_WORLD_SIZE; who sets these variables by hand is believed, too
SLURM      SLURM_NTASKS above 1, SLURM_PROCID;   SLURM_LOCALID, SLURM_NODEID, SLURM_NNODES, SLURM_NTASKS_PER_NODE,
           not in an interactive job, nor in a   SLURM_TASKS_PER_NODE, each as its step has it where there is
           batch script outside of `srun`        SLURM_STEP_...
MPI        OMPI_COMM_WORLD_SIZE, PMI_SIZE or     ..._RANK, ..._LOCAL_RANK and ..._LOCAL_SIZE; of PMI
           MV2_COMM_WORLD_SIZE above 1           MPI_LOCALRANKID and MPI_LOCALNRANKS
nobody     none of them                          the Trainer starts its processes itself (launch.py)

torchrun says where the processes meet. For SLURM and MPI this module does, unless MASTER_ADDR and MASTER_PORT are set:

MASTER_ADDR   SLURM: the first host of the node list. MPI: 127.0.0.1 on one node; on several it has to be given.
MASTER_PORT   SLURM: 15000 + (job id + step id) % 10000. MPI: the same of a checksum of the job's name.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping

from trainkit.errors import MisconfigurationException
from trainkit.rank_zero import rank_zero_info, rank_zero_only
from trainkit.world import World

INTERACTIVE = ("bash", "interactive")
FIRST_PORT, PORTS = 15000, 10000
MPI = {
    "OMPI_COMM_WORLD": {name: f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")},
    "PMI": {"SIZE": "PMI_SIZE", "RANK": "PMI_RANK", "LOCAL_SIZE": "MPI_LOCALNRANKS", "LOCAL_RANK": "MPI_LOCALRANKID"},
    "MV2_COMM_WORLD": {name: f"MV2_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")},
}
"""What implementations of MPI call the four numbers: Open MPI, MPICH and its like, MVAPICH."""
MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "HYDRA_JOBID")


# ---------------------------------------------------------------- who launched this process
def detect(environ: Mapping[str, str] = os.environ, local_size: int | None = None) -> World | None:
    """Return the processes that a launcher started, None when nobody did.

    Args:
        environ: the environment variables.
        local_size: how many there are on this node, where the launcher does not say.

    Raises:
        MisconfigurationException: a variable is no number, or does not fit the others; it is named.
    """
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        return _of_torchrun(environ, local_size)
    if is_srun(environ):
        return _of_slurm(environ)
    for names in MPI.values():
        if names["SIZE"] in environ and names["RANK"] in environ and _number(environ, names["SIZE"]) > 1:
            return _of_mpi(environ, names)
    return None


def is_srun(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one of several."""
    if "SLURM_NTASKS" not in environ or "SLURM_PROCID" not in environ:
        return False
    if environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return False
    if environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ:  # the script of sbatch itself
        return False
    return _number(environ, "SLURM_NTASKS") > 1


def _of_torchrun(environ: Mapping[str, str], local_size: int | None) -> World:
    size, rank = _number(environ, "WORLD_SIZE", least=1), _number(environ, "RANK")
    local = local_size if local_size and size % local_size == 0 else size
    local = _number(environ, "LOCAL_WORLD_SIZE", local, least=1)
    node = "GROUP_RANK" if "GROUP_RANK" in environ else "NODE_RANK"
    world = World(
        size=size,
        rank=rank,
        local_size=local,
        local_rank=_number(environ, "LOCAL_RANK", rank % local),
        node_rank=_number(environ, node, rank // local),
        num_nodes=_number(environ, "GROUP_WORLD_SIZE", max(-(-size // local), 1), least=1),
        launcher="torchrun",
    )
    return _consistent(world, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _of_slurm(environ: Mapping[str, str]) -> World:
    size, rank = _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_PROCID")
    nodes = _number(environ, _of_step(environ, "SLURM_NNODES", "SLURM_STEP_NUM_NODES"), 1, least=1)
    node = _number(environ, "SLURM_NODEID", 0)
    tasks = _tasks_per_node(environ, size, nodes)
    world = World(
        size=size,
        rank=rank,
        local_size=tasks[node] if node < len(tasks) else -(-size // nodes),
        local_rank=_number(environ, "SLURM_LOCALID", rank % (-(-size // nodes))),
        node_rank=node,
        num_nodes=nodes,
        launcher="SLURM",
    )
    return _consistent(world, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE")


def _tasks_per_node(environ: Mapping[str, str], size: int, nodes: int) -> list[int]:
    """Return how many tasks each node has, [] when SLURM does not say, or says it of more than this step."""
    name = _of_step(environ, "SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE")
    tasks: list[int] = []
    for part in environ.get(name, "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            tasks = []
            break
        tasks += [int(found[1])] * int(found[2] or 1)
    if len(tasks) == nodes and sum(tasks) == size:
        return tasks
    each = _number(environ, "SLURM_NTASKS_PER_NODE", 0)
    return [each] * nodes if each * nodes == size else []


def _of_mpi(environ: Mapping[str, str], names: Mapping[str, str]) -> World:
    size, rank = _number(environ, names["SIZE"]), _number(environ, names["RANK"])
    local = _number(environ, names["LOCAL_SIZE"], size, least=1)
    world = World(
        size=size,
        rank=rank,
        local_size=local,
        local_rank=_number(environ, names["LOCAL_RANK"], rank % local),
        node_rank=rank // local,
        num_nodes=-(-size // local),
        launcher="MPI",
    )
    return _consistent(world, names["RANK"], names["SIZE"], names["LOCAL_RANK"], names["LOCAL_SIZE"])


def _of_step(environ: Mapping[str, str], of_job: str, of_step: str) -> str:
    return of_step if of_step in environ else of_job


def _number(environ: Mapping[str, str], name: str, default: int | None = None, least: int = 0) -> int:
    """Return a variable's number."""
    given = environ.get(name, "")
    if not given and default is not None:
        return default
    if not re.fullmatch(r"\d+", given) or int(given) < least:
        raise MisconfigurationException(
            f"the environment variable {name} must be a whole number of at least {least}. Received: {given!r}. It says "
            "which of a run's processes this one is: start it by torchrun, srun or mpirun, or take the variable away."
        )
    return int(given)


def _consistent(world: World, rank: str, size: str, local_rank: str, local_size: str) -> World:
    """Return the world if its numbers fit each other."""
    wrong = None
    if world.rank >= world.size:
        wrong = f"{rank}={world.rank} must be below {size}={world.size}"
    elif world.local_rank >= world.local_size:
        wrong = f"{local_rank}={world.local_rank} must be below {local_size}={world.local_size}"
    elif world.local_size > world.size:
        wrong = f"{local_size}={world.local_size} must be at most {size}={world.size}"
    if wrong is not None:
        raise MisconfigurationException(f"the environment variables of {world.launcher} do not fit: {wrong}.")
    return world


# ---------------------------------------------------------------- where the processes meet
def meeting_point(world: World, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT for the processes of SLURM and MPI, as far as they are not set.

    Raises:
        MisconfigurationException: it can't be known; the message says what to set.
    """
    if world.launcher == "SLURM":
        step = environ.get("SLURM_STEP_ID", "")
        job = _number(environ, "SLURM_JOB_ID", 0) + (int(step) if step.isdigit() else 0)
        found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(FIRST_PORT + job % PORTS)}
        if world.num_nodes > 1 and "MASTER_ADDR" not in environ:
            found["MASTER_ADDR"] = first_host(environ)
    elif world.launcher == "MPI":
        if world.num_nodes > 1 and "MASTER_ADDR" not in environ:
            raise MisconfigurationException(
                f"MPI started {world.size} processes on {world.num_nodes} nodes, and does not say where they can meet. "
                "Set MASTER_ADDR to the name of the first node for all of them: mpirun -x MASTER_ADDR=node01 ..."
            )
        job = zlib.crc32(next((environ[name] for name in MPI_JOBS if environ.get(name)), "").encode())
        found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(FIRST_PORT + job % PORTS)}
    else:
        return {}
    return {name: value for name, value in found.items() if not environ.get(name)}


def first_host(environ: Mapping[str, str]) -> str:
    """Return the first host of SLURM's node list, such as "gpu-[03-05,9],login": "gpu-03"."""
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    name = next((name for name in names if environ.get(name)), "SLURM_NODELIST")
    hosts = node_list(environ.get(name, ""), name)
    return hosts[0]


def node_list(given: str, name: str = "SLURM_NODELIST") -> list[str]:
    """Return the hosts of a node list as SLURM writes it: "a[1-3,07]-x,b" is a1, a2, a3, a07 with "-x" behind, and b.

    Raises:
        MisconfigurationException: it is none.
    """
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", given):
        found = [""]
        for text, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            found = [before + after for before in found for after in ([text] if text else _range(ranges, given, name))]
        hosts += found
    if not hosts or given.count("[") != given.count("]") or not all(map(str.strip, hosts)):
        raise _no_list(given, name)
    return hosts


def _range(ranges: str, given: str, name: str) -> list[str]:
    """Return "01-03,7" as 01, 02, 03, 7."""
    numbers = []
    for part in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if found is None:
            raise _no_list(given, name)
        first, last = found[1], found[2] or found[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _no_list(given: str, name: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"the environment variable {name} must be a list of hosts such as 'node[01-04],login'. Received: {given!r}. "
        "Set MASTER_ADDR to the name of the first host yourself."
    )


# ---------------------------------------------------------------- the processes of a Trainer
def world_of(
    devices: int | None, num_nodes: int = 1, local: int = 1, environ: MutableMapping[str, str] = os.environ
) -> World:
    """Return the processes of a run: the launcher decides; without one they are those that the Trainer asks for.

    Where the processes of SLURM and MPI meet is written to `environ`, for torch to find.

    Args:
        devices: how many processes a node the user asks for; None for as many as there are.
        num_nodes: how many nodes the user asks for; 1 is believed to be the default.
        local: how many processes a node there are when nobody asks for a number and nobody launched any.

    Raises:
        MisconfigurationException: the launcher has started another number than the user asks for.
    """
    world = detect(environ, devices)
    if world is None:
        local = local if devices is None else devices
        return World(size=local * num_nodes, local_size=local, num_nodes=num_nodes)
    check(world, devices, num_nodes)
    environ.update(meeting_point(world, environ))
    return world


def check(world: World, devices: int | None, num_nodes: int) -> None:
    """Refuse what contradicts the launcher."""
    sources = {
        "torchrun": ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "--nproc-per-node", "--nnodes"),
        "SLURM": ("SLURM_TASKS_PER_NODE", "SLURM_NNODES", "--ntasks-per-node", "--nodes"),
        "MPI": ("the local size", "the number of nodes", "-n", "--host"),
    }
    local, nodes, per_node, several = sources[world.launcher]
    if devices is not None and devices != world.local_size:
        raise MisconfigurationException(
            f"devices={devices}, but {world.launcher} started {_count(world.local_size, 'process', 'es')} on this node "
            f"({local}={world.local_size}). Leave devices out, or start it with {per_node} {devices}."
        )
    if num_nodes not in (1, world.num_nodes):
        raise MisconfigurationException(
            f"num_nodes={num_nodes}, but {world.launcher} started processes on {_count(world.num_nodes, 'node', 's')} "
            f"({nodes}={world.size if world.launcher == 'torchrun' else world.num_nodes}). Leave num_nodes out, or "
            f"start it with {several} {num_nodes}."
        )


_announced: set[World] = set()


def announce(world: World) -> None:
    """Tell once which processes a run has, on rank 0; of one process nobody needs to be told."""
    if world.size == 1 or world in _announced:
        return
    _announced.add(world)
    rank_zero_only.rank = world.rank  # type: ignore[attr-defined]
    processes, nodes = _count(world.size, "process", "es"), _count(world.num_nodes, "node", "s")
    rank_zero_info(f"{processes} on {nodes}, started by {world.launcher or 'the Trainer'}")


def _count(number: int, what: str, plural: str) -> str:
    return f"{number} {what}{plural if number != 1 else ''}"
