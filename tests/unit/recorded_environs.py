"""What launchers put into the environment, recorded from real jobs, shortened to what tells launchers apart.

Open MPI 4.1.4 and 5.0.11, MPICH 5.0.2, Intel MPI 2021.18, Slurm 22.05.8 with two nodes. PALS, JSM and Flux are
written after their documentation, not recorded.
"""

from __future__ import annotations

__all__ = ["ENVIRONS"]

_OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "OMPI_MCA_initial_wdir": "/home/user",
}
_SLURM_JOB = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "3,1"}
_SLURM_TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_CPUS_ON_NODE": "3"}
_SLURM_STEP = {
    **_SLURM_JOB,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_CPUS_ON_NODE": "1",
}
_PMIX_OF_STEP = {"PMIX_NAMESPACE": "slurm.pmix.9.0", "PMIX_RANK": "3", "PMIX_SERVER_URI41": "pmix-server.50;tcp4://x"}
_HYDRA = {"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "11", "PMI_RANK": "1", "PMI_SIZE": "2"}

ENVIRONS: dict[str, dict[str, str]] = {
    "plain python": {"HOME": "/home/user", "PATH": "/usr/bin"},
    "mpirun of open mpi 5": {
        **_OPEN_MPI,
        "PMIX_NAMESPACE": "prterun-n1-4445@1",
        "PMIX_RANK": "1",
        "PMIX_SERVER_URI41": "prterun-n1-4445@0.0;tcp4://127.0.0.1:35839",
        "PMIX_PREFIX": "/opt/openmpi",
        "PRTE_LAUNCHED": "1",
    },
    "mpirun of open mpi 4": {
        **_OPEN_MPI,
        "PMIX_NAMESPACE": "2106589185",
        "PMIX_RANK": "1",
        "PMIX_SERVER_URI21": "2106589184.0;tcp4://127.0.0.1:35233",
        "OMPI_MCA_ess": "^singleton",
        "OMPI_MCA_ess_base_vpid": "1",
        "OMPI_MCA_orte_ess_num_procs": "2",
        "OMPI_MCA_pmix": "^s1,s2,cray,isolated",
        "OMPI_MCA_shmem_RUNTIME_QUERY_hint": "mmap",
    },
    "mpirun -np 1": {
        **_OPEN_MPI,
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "PMIX_RANK": "0",
    },
    "mpiexec of mpich": {**_HYDRA, "HYDI_CONTROL_FD": "7", "PMI_HOSTNAME": "n1"},
    "mpiexec of intel mpi": {**_HYDRA, "I_MPI_HYDRA_UUID": "961a0000-44a9-c4de", "I_MPI_PIN_INFO": "1"},
    "srun --mpi=pmix": {**_SLURM_STEP, **_PMIX_OF_STEP, "SLURM_MPI_TYPE": "pmix"},
    "srun --mpi=pmi2": {
        **_SLURM_STEP,
        "PMI_FD": "11",
        "PMI_JOBID": "9.0",
        "PMI_RANK": "3",
        "PMI_SIZE": "4",
        "SLURM_MPI_TYPE": "pmi2",
    },
    "srun --mpi=none": _SLURM_STEP,
    "sbatch script": {**_SLURM_JOB, **_SLURM_TASK},
    "srun -n1 in an sbatch script": {
        **_SLURM_JOB,
        **_SLURM_TASK,
        "SLURM_NTASKS": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "PMIX_NAMESPACE": "slurm.pmix.9.0",
        "PMIX_RANK": "0",
    },
    "salloc": _SLURM_JOB,
    "salloc with an interactive step": {
        **_SLURM_JOB,
        **_SLURM_TASK,
        "SLURM_STEP_ID": "4294967290",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_PTY_PORT": "46131",
    },
    "python typed in srun -n4 --pty bash": {
        **_SLURM_JOB,
        **_SLURM_TASK,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "4",
        "SLURM_PTY_PORT": "46407",
    },
    "srun from a pty inside a step": {
        **_SLURM_JOB,
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PTY_PORT": "46407",
        # stale: of the outer step
        "PMIX_NAMESPACE": "slurm.pmix.9.0",
        "PMIX_RANK": "0",
    },
    "mpirun in an sbatch script, remote node": {
        **_OPEN_MPI,
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "PMIX_NAMESPACE": "prterun-n1-6425@1",
        "PMIX_RANK": "3",
        **_SLURM_JOB,
        **_SLURM_TASK,
        "SLURM_NTASKS": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    },
    "mpiexec of pals": {
        "PALS_RANKID": "5",
        "PALS_LOCAL_RANKID": "1",
        "PALS_LOCAL_SIZE": "4",
        "PALS_APID": "6b1e",
        "PMI_RANK": "5",
        "PMI_SIZE": "8",
    },
    "mpiexec of pals --pmi=pmix": {
        "PALS_RANKID": "0",
        "PALS_LOCAL_RANKID": "0",
        "PALS_LOCAL_SIZE": "4",
        "PMIX_RANK": "0",
        "PMIX_NAMESPACE": "6b1e",
    },
    "jsrun": {
        "JSM_NAMESPACE_RANK": "2",
        "JSM_NAMESPACE_SIZE": "6",
        "JSM_NAMESPACE_LOCAL_RANK": "2",
        "JSM_NAMESPACE_LOCAL_SIZE": "3",
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_SIZE": "6",
        "PMIX_RANK": "2",
    },
    "flux run": {
        "FLUX_JOB_ID": "fABC",
        "FLUX_JOB_SIZE": "4",
        "FLUX_JOB_NNODES": "2",
        "FLUX_TASK_RANK": "3",
        "FLUX_TASK_LOCAL_ID": "1",
        "PMI_RANK": "3",
        "PMI_SIZE": "4",
        "PMI_FD": "9",
    },
    "prun in a pmix server": {"PMIX_RANK": "1", "PMIX_NAMESPACE": "prte-n1-77@2"},
    "an unknown launcher with pmi": {"PMI_RANK": "1", "PMI_SIZE": "3", "PMI_FD": "5"},
}
