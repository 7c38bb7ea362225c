"""Who launched a process: torchrun, SLURM, MPI or nobody, and what contradicts it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.environment import announce, detect, first_host, meeting_point, node_list, world_of
from trainkit.errors import MisconfigurationException
from trainkit.rank_zero import rank_zero_only
from trainkit.world import World

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_NODELIST": "gpu-a[07-08,12]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}  # fmt: skip
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}


# ---------------------------------------------------------------- who it was
def test_each_launcher_says_which_process_this_is() -> None:
    assert detect(TORCHRUN) == World(4, 3, 2, 1, 1, 2, "torchrun")
    assert detect(SLURM) == World(4, 2, 2, 0, 1, 2, "SLURM")
    assert detect(OPEN_MPI) == World(4, 3, 4, 3, 0, 1, "MPI")
    assert detect(MPICH) == World(4, 3, 2, 1, 1, 2, "MPI")
    assert detect({}) is None


def test_torchrun_is_believed_before_slurm_and_slurm_before_mpi() -> None:
    assert detect({**MPICH, **SLURM, **TORCHRUN}).launcher == "torchrun"  # type: ignore[union-attr]
    assert detect({**MPICH, **SLURM}).launcher == "SLURM"  # type: ignore[union-attr]


def test_one_process_of_torchrun_was_launched_and_one_task_of_slurm_or_mpi_was_not() -> None:
    assert detect({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == World(launcher="torchrun")
    assert detect({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert detect({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None
    assert detect({"RANK": "1"}) is None


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_job_of_slurm_launched_nobody(name: str) -> None:
    assert detect({**SLURM, "SLURM_JOB_NAME": name}) is None


def test_the_script_of_sbatch_is_no_task_until_srun_starts_it() -> None:
    assert detect({**SLURM, "ENVIRONMENT": "BATCH"}) is None
    assert detect({**SLURM, "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}) is not None


def test_variables_set_by_hand_need_no_local_ones() -> None:
    alone = {"RANK": "1", "WORLD_SIZE": "2"}
    assert detect(alone) == World(2, 1, 2, 1, 0, 1, "torchrun")
    assert world_of(1, 2, 1, dict(alone)) == World(2, 1, 1, 0, 1, 2, "torchrun")  # one process on each of two nodes


def test_tasks_of_slurm_may_be_spread_unevenly() -> None:
    uneven = {**SLURM, "SLURM_NTASKS": "7", "SLURM_NNODES": "4", "SLURM_TASKS_PER_NODE": "2(x3),1"}
    assert detect({**uneven, "SLURM_NODEID": "3", "SLURM_PROCID": "6"}).local_size == 1  # type: ignore[union-attr]
    assert detect({**uneven, "SLURM_NODEID": "1", "SLURM_PROCID": "2"}).local_size == 2  # type: ignore[union-attr]
    step = {**uneven, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert detect({**step, "SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}) == World(
        2, 1, 2, 1, 0, 1, "SLURM"
    )


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [(TORCHRUN, name, value) for name in TORCHRUN for value in ("x", "-1", "1.5")]
    + [(SLURM, name, "x") for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES")]
    + [(OPEN_MPI, name, "x") for name in OPEN_MPI]
    + [
        (TORCHRUN, "WORLD_SIZE", "0"),
        (TORCHRUN, "RANK", "4"),
        (TORCHRUN, "LOCAL_RANK", "2"),
        (SLURM, "SLURM_PROCID", "9"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{name}.*{re.escape(value)}"):
        detect({**environ, name: value})


# ---------------------------------------------------------------- where they meet
def test_slurm_meets_at_the_first_host_and_a_port_of_the_job() -> None:
    environ = dict(SLURM)
    world_of(None, 1, 1, environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("gpu-a07", str(15000 + 4567))
    own = {**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    world_of(None, 1, 1, own)
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("here", "1")


def test_mpi_meets_on_this_node_and_asks_where_with_several() -> None:
    environ = {**OPEN_MPI, "PMIX_NAMESPACE": "job-1"}
    world = world_of(None, 1, 1, environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    assert 15000 <= int(environ["MASTER_PORT"]) < 25000
    assert meeting_point(world, OPEN_MPI)["MASTER_PORT"] != environ["MASTER_PORT"]
    with pytest.raises(MisconfigurationException, match="MASTER_ADDR"):
        world_of(None, 1, 1, dict(MPICH))
    world_of(None, 1, 1, {**MPICH, "MASTER_ADDR": "node01"})


@pytest.mark.parametrize(
    ("given_list", "hosts"),
    [
        ("node01", ["node01"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("a-b-[9-11],login-1", ["a-b-9", "a-b-10", "a-b-11", "login-1"]),
        ("n[1-2]-x", ["n1-x", "n2-x"]),
        ("rack[0-1]n[1,3]", ["rack0n1", "rack0n3", "rack1n1", "rack1n3"]),
        ("10.0.0.1,10.0.0.2", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_a_node_list_names_its_hosts(given_list: str, hosts: list[str]) -> None:
    assert node_list(given_list) == hosts
    assert first_host({"SLURM_NODELIST": given_list}) == hosts[0]


@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-z][a-z0-9]{0,4}(-[a-z]{1,3})?-?", fullmatch=True),
            st.integers(1, 4),
            st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3)), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_every_node_list_that_slurm_writes_is_read(parts: list[tuple[str, int, list[tuple[int, int]]]]) -> None:
    hosts, written = [], []
    for prefix, width, ranges in parts:
        inside = []
        for first, more in ranges:
            numbers = [str(number).zfill(width) for number in range(first, first + more + 1)]
            inside.append(f"{numbers[0]}-{numbers[-1]}" if more else numbers[0])
            hosts += [prefix + number for number in numbers]
        written.append(f"{prefix}[{','.join(inside)}]")
    assert node_list(",".join(written)) == hosts


@pytest.mark.parametrize("wrong", ["", "node[", "node[a-b]", "node[1-", "node[]", "[3-1]"])
def test_what_is_no_node_list_is_an_error_that_names_the_variable(wrong: str) -> None:
    with pytest.raises(MisconfigurationException, match="SLURM_STEP_NODELIST" if wrong else "SLURM_NODELIST"):
        first_host({"SLURM_STEP_NODELIST": wrong})


# ---------------------------------------------------------------- what the Trainer asks for
def test_nobody_launched_what_the_trainer_asks_for() -> None:
    assert world_of(2, 1, 1, {}) == World(size=2, local_size=2)
    assert world_of(2, 3, 1, {}) == World(size=6, local_size=2, num_nodes=3)
    assert world_of(None, 1, 8, {}) == World(size=8, local_size=8)
    assert world_of(None, 1, 1, {}) == World()


def test_a_launcher_decides_where_nobody_asks_and_agrees_with_who_asks_for_the_same() -> None:
    assert world_of(None, 1, 8, dict(TORCHRUN)) == detect(TORCHRUN)
    assert world_of(2, 2, 2, dict(TORCHRUN)) == detect(TORCHRUN)


@pytest.mark.parametrize(
    ("environ", "devices", "nodes", "says"),
    [
        (TORCHRUN, 4, 1, r"devices=4, but torchrun started 2 processes on this node \(LOCAL_WORLD_SIZE=2\)"),
        (TORCHRUN, 1, 1, r"devices=1, but torchrun started 2 processes"),
        (TORCHRUN, None, 3, r"num_nodes=3, but torchrun started processes on 2 nodes"),
        (SLURM, 4, 2, r"devices=4, but SLURM started 2 processes .*--ntasks-per-node 4"),
        (SLURM, 2, 4, r"num_nodes=4, but SLURM started processes on 2 nodes \(SLURM_NNODES=2\)"),
        (OPEN_MPI, 2, 1, r"devices=2, but MPI started 4 processes"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, 2, 1, r"started 1 process on this node"),
    ],
)
def test_a_contradiction_names_both_sides(environ: dict[str, str], devices: int | None, nodes: int, says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        world_of(devices, nodes, 1, dict(environ))


def test_who_launched_is_told_once_by_rank_0(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    world = World(6, 0, 3, 0, 0, 2, "torchrun")
    for _ in range(2):
        announce(world)
    announce(World())
    announce(World(6, 1, 3, 1, 0, 2, "torchrun"))
    assert caplog.messages == ["6 processes on 2 nodes, started by torchrun"]
