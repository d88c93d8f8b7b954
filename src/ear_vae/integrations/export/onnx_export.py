"""A model as ONNX files, for runtimes without torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ear_vae._atomic import atomic_folder
from ear_vae.errors import EarVAEError
from ear_vae.integrations._optional import optional
from ear_vae.integrations.export.graphs import (
    GraphPart,
    exportable,
    exported,
    parts_of,
    quiet_exporters,
    reason_of,
    require_equal,
)
from ear_vae.integrations.onnx import FORMAT, FORMAT_VERSION, open_session
from ear_vae.limits import pack_facts
from ear_vae.vae import EarVAE

with optional("onnx", "onnxscript", extra="onnx"):
    import onnx
    import onnxscript  # noqa: F401 - torch's exporter needs it

WEIGHTS_FILE = "weights.bin"
# The newest that torch's exporter writes without converting; runtimes read older ones than their own.
_OPSET = 20
# Smaller tensors stay in the graph.
_FEWEST_BYTES = 1024
# Runtimes map weights into memory where they begin on a page.
_PAGE = 4096


def export_onnx(
    vae: EarVAE,
    destination: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> float:
    """Writes `encoder.onnx`, `decoder.onnx`, for a model with a transformer its halves, and their weights.

    - `encoder.onnx`: `audio` [B, C, N * downsampling_ratio] to `moments` [B, 2 D, N], mean ‖ scale; the
      standard deviation is softplus(scale) + min_std.
    - `decoder.onnx`: `latents` [B, D, N] to `audio` [B, C, N * downsampling_ratio].
    - `transformer.onnx` and `convolutions.onnx`: the same in two steps, of which the second can be run in
      tiles.

    All take any batch and any number of frames in float32, and read their weights from `weights.bin`. Their
    metadata hold, under `ear_vae`, JSON with the config, the fingerprint of the weights, and how many frames
    before and after a tile make it exact.

    Args:
        vae: The model.
        destination: The folder; its parents are made.
        dtype: Dtype to store the weights in: float32, or float16, which halves the files. Everything is
            computed in float32 in both cases.
        overwrite: Replace these files in a folder that exists.

    Returns:
        The largest difference from the model (with its weights rounded to `dtype`), relative to the largest
        value, of a run of each file on noise.

    Raises:
        EarVAEError: The dtype is another one, the destination exists or cannot be written to, or a file does
            not give what the model does.
    """
    if dtype not in (torch.float32, torch.float16):
        raise EarVAEError(f"ONNX files hold weights in float32 or float16, not in {dtype}")
    plain = exportable(vae, dtype)
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": vae.name,
        "config": vae.config.to_dict(),
        "weights_sha256": plain.weights_sha256,
    }
    parts = parts_of(plain)
    with atomic_folder(Path(destination), overwrite=overwrite) as folder:
        with open(folder / WEIGHTS_FILE, "wb") as file:
            weights = _Weights(file, half=dtype == torch.float16)
            for part in parts:
                model = _model(part)
                weights.take_from(model.graph)
                stated = {**facts, "part": part.name, "context_frames": part.context_frames}
                onnx.helper.set_model_props(model, pack_facts(stated))
                (folder / f"{part.name}.onnx").write_bytes(model.SerializeToString())
        return max(require_equal(part, _runner(folder, part)) for part in parts)


def _model(part: GraphPart) -> Any:
    program = exported(part)
    try:
        with quiet_exporters():
            converted: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=[part.input],
                output_names=[_output_name(part)],
                verbose=False,
            )
            model = converted.model_proto
    # As above: whatever the exporter's parts raise.
    except Exception as error:
        raise EarVAEError(f"the {part.name} cannot be written as ONNX: {reason_of(error)}") from error
    graph = model.graph
    # Of the exporter's debugging, with paths of this machine and names of symbols.
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    batch, positions = "batch", "samples" if part.input == "audio" else "frames"
    (given,), (result,) = graph.input, graph.output
    for value, length in (
        (given, positions),
        (result, "samples" if part.output == "audio" else "frames"),
    ):
        del value.metadata_props[:]
        shape = value.type.tensor_type.shape.dim
        shape[0].dim_param, shape[2].dim_param = batch, length
    model.producer_name, model.producer_version = "ear-vae", ""
    return model


def _output_name(part: GraphPart) -> str:
    """The transformer's output is not the latents that it takes."""
    return "transformed" if part.name == "transformer" else part.output


class _Weights:
    """One file for the large tensors of several graphs, each of them once.

    Args:
        file: The file to write.
        half: Store tensors in float16 that lose nothing by it.
    """

    def __init__(self, file: IO[bytes], *, half: bool) -> None:
        self._file, self._half = file, half
        self._places: dict[bytes, tuple[int, int]] = {}

    def take_from(self, graph: Any) -> None:
        """Moves the large tensors of a graph into the file."""
        casts = []
        for tensor in graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if values.nbytes < _FEWEST_BYTES:
                continue
            name = tensor.name
            if self._half and values.dtype == np.float32:
                rounded = values.astype(np.float16)
                if np.array_equal(rounded.astype(np.float32), values):
                    values, tensor.name = rounded, f"{name}_float16"
                    cast = onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)
                    casts.append(cast)
            self._move(tensor, np.ascontiguousarray(values))
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend([*casts, *rest])

    def _move(self, tensor: Any, values: np.ndarray) -> None:
        content = values.tobytes()
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % _PAGE))
            self._places[key] = self._file.tell(), len(content)
            self._file.write(content)
        offset, length = self._places[key]
        name, shape = tensor.name, list(tensor.dims)
        tensor.Clear()
        tensor.name, tensor.data_type = name, onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor.dims.extend(shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": WEIGHTS_FILE, "offset": offset, "length": length}
        for field, value in place.items():
            tensor.external_data.add(key=field, value=str(value))


def _runner(folder: Path, part: GraphPart) -> Callable[[Tensor], Tensor]:
    session = open_session(folder / f"{part.name}.onnx")
    return lambda x: torch.from_numpy(session.run(None, {part.input: x.numpy()})[0])
