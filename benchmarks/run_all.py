"""Make the results that need a GPU again, all but those of quality.py, as many as time allows.

    python benchmarks/run_all.py --out results --seconds 1500
    python benchmarks/run_all.py --out results --only step --list

With two GPUs, what runs on both comes first; then what is timed alone runs on the first, and what
generates videos on the second, several at a time; then they share the other methods. With one GPU
all follow each other. A task whose result is there is left out; one that was cut short goes on
where its script can. Logs lie in --out/logs; at the end of --seconds, or interrupted, it stops
whatever still runs.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from environment import folders_of_fa4  # noqa: E402

from dit_sparse import available_methods  # noqa: E402

PIPELINES = {"wan_tiny": 1, "hunyuan_video_tiny": 4, "cogvideox_tiny": 1}  # frames a latent frame
SEEDS = "auto", "rettention", "adaspa", "draftattention"  # sparse-vdit searches for minutes
LARGER = {  # pixels, latent frames: larger and longer than trained
    (256, 33): "--prompts 4 --seeds 1 --tuning-prompts 2",
    (192, 25): "--prompts 8 --seeds 1 --tuning-prompts 3",
}
OTHER_PROMPTS = 77  # a seed that nothing was chosen with


@dataclass(frozen=True)
class Task:
    """A command, and the file that is there when it is done ("" where the command itself knows)."""

    name: str
    command: str
    result: str = ""


def both_gpus(gpu: str) -> list[Task]:
    ulysses = f"ulysses_{gpu}x2.json"
    launch = "-m torch.distributed.run --nproc-per-node 2 benchmarks/ulysses.py"
    return [
        Task("ulysses", f"{launch} --out {{out}}/{ulysses}", ulysses),
        Task("two-gpus", f"tests/compatibility.py --gpu {{out}}/gpu_tests_{gpu}.json -k two_gpus"),
    ]


def timed(gpu: str, fa4: str) -> list[Task]:
    """One at a time, with the GPU to themselves."""
    kernels = f"benchmarks/kernels.py {fa4} --skip-cases --out {{out}}/kernels_{gpu}.json"
    real = "--mask random --mask real --engine triton --engine fa4"
    search = "block_mass sampled_mass block_pool selection lists order reorder".split()
    search = " ".join(f"--engine {name}" for name in search) + " --mask real --density 0.2"
    fp8 = " ".join(f"--engine '{name}'" for name in ("triton", "triton fp8", "quantize fp8", "fa4"))
    fp8 += " --mask random --density 0.5 --density 0.2"
    peers = "--engine triton --engine fa4 --engine flex --mask random --mask uneven --density 0.2"
    tasks = [
        Task("kernels", f"{kernels} --skip-search {real} --seconds 150"),
        Task("kernels-fp8", f"{kernels} --skip-search {fp8} --seconds 110"),
        Task("kernels-peers", f"{kernels} --skip-search {peers} --seconds 120"),
        Task("kernels-search", f"{kernels} {search} --seconds 60"),
        Task("counters", f"benchmarks/counters.py --out {{out}}/counters_{gpu}.json"),
    ]
    for model, more in (
        ("wan-14b-720p", "--modes eager --densities 0.2 --method adaspa-sampled"),
        ("cogvideox-5b-480p", "--modes eager --densities 0.2 --method adaspa-sampled"),
        ("hunyuanvideo-720p", "--modes eager --densities 0.2 --method adaspa-sampled"),
        ("hunyuanvideo-720p", "--modes eager --densities 0.1 --method auto --cache-device model"),
        ("hunyuanvideo-720p", "--modes eager --densities 0.1 --method auto --cache-device cpu"),
        ("wan-1.3b-480p", "--densities 0.1 --method auto --cache-device model"),
        ("wan-1.3b-480p", "--modes eager --densities 0.1 --method auto --cache-device cpu"),
    ):
        words = more.split()
        method = words[words.index("--method") + 1]
        command = f"benchmarks/step.py --model {model}"
        where = "_cpu" if "cpu" in words else ""
        name = f"step_{model}_{method}{where}_{gpu}.json"
        command += f" {more} --out {{out}}/{name}"
        tasks.append(Task(name.removesuffix(".json"), command, name))
    name = f"crossover_{gpu}.json"
    return [*tasks, Task("crossover", f"benchmarks/crossover.py --out {{out}}/{name}", name)]


def sharing(script: str, pipeline: str, gpu: int) -> str:
    """The command of a script that takes turns with others on a GPU."""
    return f"benchmarks/{script} --pipeline samples/{pipeline} --lock {{out}}/gpu-{gpu}.lock"


def sweeps(pipeline: str) -> list[Task]:
    """Of one pipeline, beside those of the others on the same GPU."""
    pareto = sharing("pareto.py", pipeline, 1)
    out, seeds = f"pareto_{pipeline}.json", " ".join(f"--method {name}" for name in SEEDS)
    tasks = [Task(f"pareto {pipeline}", f"{pareto} --out {{out}}/{out} {seeds}")]
    for (side, latents), options in LARGER.items():
        frames = (latents - 1) * PIPELINES[pipeline] + 1
        options += f" --height {side} --width {side} --frames {frames}"
        options += f" --settings-of {{out}}/{out} --prompt-seed {OTHER_PROMPTS} {seeds}"
        larger = f"pareto_{pipeline}_{side}.json"
        tasks.append(Task(f"larger {pipeline}", f"{pareto} --out {{out}}/{larger} {options}"))
    ablation = f"ablation_auto_{pipeline}.json"
    command = f"benchmarks/ablation_auto.py --pipeline samples/{pipeline} --target balanced"
    tasks.append(Task(f"ablation {pipeline}", f"{command} --out {{out}}/{ablation}"))
    caches = f"caches_{pipeline}.json"
    command = sharing("caches.py", pipeline, 1) + f" --out {{out}}/{caches}"
    tasks.append(Task(f"caches {pipeline}", command, caches))
    return [*tasks, field(pipeline, 1)]


def field(pipeline: str, gpu: int) -> Task:
    """The other methods, those that no other GPU has begun."""
    methods = [name for name in available_methods() if name not in SEEDS]
    command = sharing("pareto.py", pipeline, gpu) + " --claims {out}/claims"
    command += f" --out {{out}}/field_{pipeline}_{gpu}.json"
    return Task(f"field {pipeline} {gpu}", command + "".join(f" --method {m}" for m in methods))


def checks(gpu: str) -> list[Task]:
    """Nothing in them is timed."""
    log = f"{{out}}/gpu_tests_{gpu}.json"
    selected = "-k 'not for_hopper and not smallest_shared'"  # they compile, and run nothing
    tasks = [
        Task("gpu-tests", f"tests/compatibility.py --gpu {log} {selected}"),
        Task("sanitizer", f"tests/sanitizer.py {log}"),
    ]
    scripts = {
        "claims_{}": "benchmarks/claims.py --prompts 10",
        "prompt_check_{}": "samples/prompt_check.py --prompts 100",
        "structure_{}_256": "benchmarks/structure.py --size 256 --frames 33 --prompts 1",
    }
    for pipeline in PIPELINES:
        for name, script in scripts.items():
            result = name.format(pipeline) + ".json"
            command = f"{script} --pipeline samples/{pipeline} --out {{out}}/{result}"
            tasks.append(Task(result.removesuffix(".json"), command, result))
    return tasks


class Run:
    """Tasks in lanes; a lane is a list of tasks that follow each other on one GPU."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.end = args, time.monotonic() + args.seconds
        self.running: set[subprocess.Popen] = set()

    def left(self, task: Task) -> bool:
        wanted = not self.args.only or any(word in task.name for word in self.args.only)
        return wanted and not (task.result and (self.args.out / task.result).is_file())

    def lanes(self, of_gpus: list[tuple[str, list[Task]]]) -> None:
        """Run lanes beside each other, to their ends."""
        threads = [threading.Thread(target=self.lane, args=lane) for lane in of_gpus]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            try:
                if time.monotonic() > self.end:
                    self.stop()
                time.sleep(1)
            except KeyboardInterrupt:
                self.end = 0.0

    def stop(self) -> None:
        for process in list(self.running):
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGTERM)

    def lane(self, gpus: str, tasks: list[Task]) -> None:
        for number, task in enumerate(tasks):
            if self.left(task) and time.monotonic() < self.end:
                self.run(gpus, task, self.args.out / "logs" / f"{task.name}-{number}.log")

    def paths(self, task: Task) -> dict[str, str]:
        """flash-attn-4 for the dense side of whole steps, as kernels.py finds it by itself."""
        if self.args.fa4 is None or "step.py" not in task.command:
            return {}
        folders = folders_of_fa4(self.args.fa4.resolve())
        return {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}

    def run(self, gpus: str, task: Task, log: Path) -> None:
        command = [word.format(out=self.args.out) for word in shlex.split(task.command)]
        result = self.args.out / task.result
        part = result.with_name(f"unfinished-{result.name}")
        if task.result:
            command = [word.replace(str(result), str(part)) for word in command]
        if self.args.commit and "prompt_check" not in task.command:
            command += ["--commit", self.args.commit]
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus} | self.paths(task),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        if task.result and code == 0:
            part.replace(result)
        print(f"{task.name}: {code} after {time.monotonic() - started:.0f} s", flush=True)


def stages(gpus: int, gpu: str, fa4: str) -> list[list[tuple[str, list[Task]]]]:
    """Lanes that run beside each other, stage by stage."""
    generate = [sweeps(name) for name in PIPELINES]
    if gpus == 1:
        tests = [("0", checks(gpu))]
        return [[("0", timed(gpu, fa4))], [("0", tasks) for tasks in generate], tests]
    rest = [field(name, 0) for name in PIPELINES]
    first = [("0", [*timed(gpu, fa4), *checks(gpu), *rest])]
    return [[("0,1", both_gpus(gpu))], [*first, *(("1", tasks) for tasks in generate)]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    add("--out", type=Path, required=True, help="folder of the results and logs")
    add("--seconds", type=float, default=1e9, help="stop everything then")
    add("--only", action="append", help="tasks with this in their name; repeatable")
    add("--fa4", type=Path, help="folder that pip --target filled with flash-attn-4")
    add("--list", action="store_true", help="say what would run")
    add("--commit", help="commit to record where there is no git")
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    gpus = min(torch.cuda.device_count(), 2)
    if not gpus and not args.list:
        sys.exit("this needs a GPU; --list says what would run there")
    name = torch.cuda.get_device_name().split()[1].lower() if gpus else "gpu"
    run, fa4 = Run(args), f"--fa4 {shlex.quote(str(args.fa4.resolve()))}" if args.fa4 else ""
    for lanes in stages(gpus or 2, name, fa4):
        if not args.list:
            run.lanes(lanes)
            continue
        for on, tasks in lanes:
            for task in filter(run.left, tasks):
                print(f"GPU {on}: {task.name}: {task.command}")


if __name__ == "__main__":
    main()
