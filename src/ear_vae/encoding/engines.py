"""Who encodes the shards: this process, several on this machine, or actors on a cluster of Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ear_vae._atomic import temporary_folder
from ear_vae.audio.processes import current_folder_off_the_path, prepare_process, processors
from ear_vae.encoding.plan import EncodingPlan
from ear_vae.encoding.reading import PLAN_FILE
from ear_vae.encoding.shards import FileDone, ShardEncoder
from ear_vae.errors import EarVAEError, in_one_line
from ear_vae.vae import EarVAE

# Decoding and resampling a song takes a core some hundredth of its length; GPUs take ten cores' worth.
_MOST_DECODERS = 8
_CORES_PER_DECODER_ON_CPU = 4


@dataclass(frozen=True)
class Workers:
    """How many processes do what.

    Attributes:
        devices: Device of each worker that encodes.
        threads: Threads of each.
        decoders: Processes that decode for each.
        optimize: Whether those on GPUs call `EarVAE.optimize_for_inference`.
    """

    devices: tuple[str, ...]
    threads: int
    decoders: int
    optimize: bool = False


def usual_workers(
    device: torch.device, count: int | None, threads: int | None, decoders: int | None, *, optimize: bool
) -> Workers:
    """Divides the processors of this machine between workers.

    Args:
        device: Device of the model; of several workers on CUDA each has the next GPU.
        count: Number of workers; 1 by default.
        threads: Threads of each; by default its share of the processors.
        decoders: Processes that decode for each; by default what its threads leave time for.
        optimize: Whether those on GPUs call `EarVAE.optimize_for_inference`.
    """
    number = count or 1
    gpus = torch.cuda.device_count() if device.type == "cuda" and number > 1 else 0
    devices = tuple(f"cuda:{worker % gpus}" if gpus else str(device) for worker in range(number))
    share = max(1, processors() // number)
    per_decoder = _CORES_PER_DECODER_ON_CPU if device.type == "cpu" else 1
    usual_decoders = max(1, min(_MOST_DECODERS, share // per_decoder))
    return Workers(devices, threads or share, usual_decoders if decoders is None else decoders, optimize)


@dataclass(frozen=True)
class ShardDone:
    """What is reported when a shard is in place.

    Attributes:
        number: Its number.
    """

    number: int


Report = Callable[[FileDone | ShardDone], None]


@dataclass(frozen=True)
class EncodingJob:
    """What an engine has to do.

    Attributes:
        output: Folder of the output, which holds the plan.
        bases: Folders that the paths of the plan's sources are relative to.
        numbers: Numbers of the shards to encode.
        vae: Model to encode with.
        workers: Who does it.
        report: Function that is called with what has been done.
    """

    output: Path
    bases: Sequence[Path]
    numbers: Sequence[int]
    vae: EarVAE
    workers: Workers
    report: Report


def encode_here(job: EncodingJob) -> None:
    """Encodes shards one after the other in this process, with the threads that torch has.

    Raises:
        EarVAEError: The output cannot be written.
    """
    with _shard_encoder(job.output, job.bases, job.vae, job.workers) as encoder:
        for number in job.numbers:
            encoder.encode(number, job.report)
            job.report(ShardDone(number))


def encode_in_processes(job: EncodingJob) -> None:
    """Encodes shards in several processes of this machine, each with a copy of the model.

    Raises:
        EarVAEError: The output cannot be written, or a process died; the others finish their shards.
    """
    waiting = list(reversed(job.numbers))
    with temporary_folder() as folder, ExitStack() as stack:
        model = _saved(job.vae, folder / "model")
        processes: dict[Connection, _Worker] = {}
        for device in job.workers.devices[: len(waiting)]:
            worker = _Worker((job.output, job.bases, model, device, job.workers))
            stack.callback(worker.end)
            processes[worker.connection] = worker
            worker.connection.send(waiting.pop())
        while processes:
            for connection in wait(list(processes)):
                worker = processes[connection]  # type: ignore[index]
                message = worker.receive()
                job.report(message)
                if isinstance(message, FileDone):
                    continue
                if waiting:
                    worker.connection.send(waiting.pop())
                else:
                    del processes[worker.connection]


def encode_with_ray(job: EncodingJob) -> None:
    """Encodes shards in an actor pool of Ray Data, over whatever cluster it is connected to.

    What Ray passes around is the numbers of the shards. Sources and output must lie where every machine finds
    them under the same path.

    Raises:
        EarVAEError: Ray is not installed, or an actor failed on what another would fail on as well.
    """
    try:
        import ray
    except ImportError:
        raise EarVAEError("the engine ray takes Ray; install it with: pip install 'ear-vae[ray]'") from None
    with temporary_folder() as folder:
        files = {path.name: path.read_bytes() for path in _saved(job.vae, folder / "model").path.iterdir()}
    on_gpu = job.vae.device.type == "cuda"
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    arguments = {
        "output": str(job.output.absolute()),
        "bases": [str(base.absolute()) for base in job.bases],
        "files": ray.put(files),
        "name": job.vae.name,
        "dtype": str(job.vae.dtype).removeprefix("torch."),
        "device": "cuda" if on_gpu else str(job.vae.device),
        "workers": job.workers,
    }
    rows = ray.data.from_items(
        [{"shard": number} for number in job.numbers], override_num_blocks=len(job.numbers)
    )
    done = rows.map_batches(
        _RayActor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(job.workers.devices)),
        num_cpus=job.workers.threads,
        num_gpus=1 if on_gpu else 0,
    )
    try:
        for row in done.iter_rows():
            for num_bytes, seconds in zip(row["num_bytes"], row["seconds"], strict=True):
                job.report(FileDone(int(num_bytes), float(seconds)))
            job.report(ShardDone(int(row["shard"])))
    except ray.exceptions.RayError as error:
        raise EarVAEError(f"an actor of Ray failed: {in_one_line(error)}") from error
    finally:
        context.enable_progress_bars = shown


@dataclass(frozen=True)
class _SavedModel:
    """A model as other processes load it."""

    path: Path
    name: str
    dtype: str

    def load(self, device: str, *, optimize: bool) -> EarVAE:
        vae = EarVAE.from_pretrained(self.path, device=device, dtype=self.dtype)
        vae.name = self.name
        if optimize and vae.device.type == "cuda":  # on a CPU the plan says what to do
            vae.optimize_for_inference()
        return vae


def _saved(vae: EarVAE, folder: Path) -> _SavedModel:
    vae.save_pretrained(folder)
    return _SavedModel(folder, vae.name, str(vae.dtype).removeprefix("torch."))


class _Worker:
    """A process that encodes one shard after the other."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        # A fork of a process that has used torch can hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Not a daemon, which could not have decoders.
        self._process: BaseProcess = context.Process(target=_serve, args=(theirs, *arguments))
        with current_folder_off_the_path():
            self._process.start()
        theirs.close()

    def receive(self) -> FileDone | ShardDone:
        """Waits for what it has done next.

        Raises:
            EarVAEError: It failed, or died.
        """
        try:
            message: FileDone | ShardDone | EarVAEError = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise EarVAEError(
                f"a process that encoded ended with {self._process.exitcode}, perhaps for want of memory; "
                "run the same again, it goes on where it stopped"
            ) from None
        if isinstance(message, EarVAEError):
            raise message
        return message

    def end(self) -> None:
        """Ends the process, in the middle of a shard if need be."""
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _serve(
    connection: Connection,
    output: Path,
    bases: Sequence[Path],
    model: _SavedModel,
    device: str,
    workers: Workers,
) -> None:
    """Encodes the shards that it is asked for until nobody asks any more."""
    prepare_process(workers.threads)
    with suppress(EOFError, OSError):  # nobody is left to hear
        try:
            with _shard_encoder(
                output, bases, model.load(device, optimize=workers.optimize), workers
            ) as encoder:
                while True:
                    number = connection.recv()
                    encoder.encode(number, connection.send)
                    connection.send(ShardDone(number))
        except EarVAEError as error:
            connection.send(error)
        except (EOFError, OSError):
            raise
        except Exception as error:
            connection.send(EarVAEError(in_one_line(error)))


@contextmanager
def _shard_encoder(
    output: Path, bases: Sequence[Path], vae: EarVAE, workers: Workers
) -> Iterator[ShardEncoder]:
    encoder = ShardEncoder(output, EncodingPlan(output / PLAN_FILE), bases, vae, decoders=workers.decoders)
    try:
        yield encoder
    finally:
        encoder.close()


class _RayActor:
    """Encodes the shards whose numbers it is called with."""

    def __init__(
        self,
        output: str,
        bases: Sequence[str],
        files: Any,
        name: str,
        dtype: str,
        device: str,
        workers: Workers,
    ) -> None:
        import ray

        torch.set_num_threads(workers.threads)
        with temporary_folder() as folder:
            for file, content in ray.get(files).items():
                (folder / file).write_bytes(content)
            vae = _SavedModel(folder, name, dtype).load(device, optimize=workers.optimize)
        self._encoder = ShardEncoder(
            Path(output),
            EncodingPlan(Path(output) / PLAN_FILE),
            [Path(base) for base in bases],
            vae,
            decoders=workers.decoders,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        files: list[FileDone] = []
        (number,) = batch["shard"]
        self._encoder.encode(int(number), files.append)
        return {
            "shard": [number],
            "num_bytes": [[file.num_bytes for file in files]],
            "seconds": [[file.seconds for file in files]],
        }
