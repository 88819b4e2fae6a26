"""llama.cpp with the weights of a model of ours: a peer for the bench.

The weights are written to a GGUF, the file that llama.cpp reads. llama-cpp-python is how Python calls
llama.cpp. Token ids go in and logits come out, so the file has no vocabulary. llama.cpp has neither dynamic
NTK nor LogN: beyond the trained length its logits differ from ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from qwen_ref.bench.measure import Subject
from qwen_ref.bench.synthetic import temporary_folder
from qwen_ref.commands.cli import Progress
from qwen_ref.config import InputError, QwenConfig
from qwen_ref.model import Block, Qwen

# The forms that matrices may have in a GGUF, and the dtype to load them in for it; "": that of ours.
FORMS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "q8_0": "", "q4_0": ""}
_UBATCH = 512  # tokens of a prompt that llama.cpp takes through the layers at a time: its default
_SPINNING = (
    0.03  # seconds. GNU OpenMP's threads pause 300,000 times, 14 ms at 3 GHz on Intel, before they sleep
)


def require_llama() -> None:
    """Raises ValueError where the extra is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("llama_cpp", "gguf")):
        raise InputError(
            "llama-cpp-python is not installed; pip install 'qwen_ref[llama]' compiles it in ten minutes, "
            "with a C++ compiler"
        )
    try:
        _library()
    except RuntimeError as error:  # as llama_cpp calls what the system has against its library
        raise InputError(f"llama-cpp-python does not start here: {error}; install it anew") from None


def nearest_form(dtype: torch.dtype, bits: int | None) -> str:
    """The form nearest to weights of a dtype, or to weights quantised to so many bits."""
    if bits is not None:
        return {8: "q8_0", 4: "q4_0"}[bits]
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")


# The file


def _tensors(model: Qwen) -> Iterator[tuple[str, Tensor]]:
    """Names in a GGUF, and weights. No row is moved: for this architecture llama.cpp pairs the halves of a
    head, as Qwen does.
    """
    yield "token_embd.weight", model.embed.weight
    for number, block in enumerate(cast(Iterator[Block], model.blocks)):
        layers = {
            "attn_norm": block.attn_norm,
            "attn_qkv": block.attn.qkv,
            "attn_output": block.attn.out,
            "ffn_norm": block.mlp_norm,
            "ffn_gate": block.mlp.gate,
            "ffn_up": block.mlp.up,
            "ffn_down": block.mlp.down,
        }
        for name, layer in layers.items():
            for kind, tensor in layer.named_parameters():
                yield f"blk.{number}.{name}.{kind}", tensor
    yield "output_norm.weight", model.norm.weight
    yield "output.weight", model.lm_head.weight


class Gguf:
    """The GGUF of a plain model on the CPU: matrices in a form, norms and biases in float32, as llama.cpp
    wants them.

    Raises ValueError where the form cuts rows into blocks and a row has no whole number of them.
    """

    def __init__(self, model: Qwen, form: str) -> None:
        import gguf

        kinds = gguf.GGMLQuantizationType
        self.config = model.config
        self.tensors = [
            (name, tensor.detach(), kinds[form.upper()] if tensor.ndim == 2 else kinds.F32)
            for name, tensor in _tensors(model)
        ]
        self.sizes = []
        for name, tensor, kind in self.tensors:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if tensor.shape[-1] % block:
                raise InputError(
                    f"llama.cpp:{form} needs rows of a multiple of {block} numbers; those of {name} have "
                    f"{tensor.shape[-1]}; use llama.cpp:bf16"
                )
            self.sizes.append(tensor.numel() // block * size)

    def write(self, file: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Writes it, a tensor at a time. progress is called with the bytes done and the bytes in all."""
        import gguf

        config, writer, done = self.config, gguf.GGUFWriter(file, "qwen"), 0
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.seq_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)  # gate and up together, as published
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_attention_heads)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        writer.add_rope_freq_base(config.rotary_emb_base)
        writer.add_rope_dimension_count(config.kv_channels)
        for (name, tensor, kind), size in zip(self.tensors, self.sizes, strict=True):
            writer.add_tensor_info(name, tensor.shape, numpy.dtype(numpy.float32), size, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (_, tensor, kind), size in zip(self.tensors, self.sizes, strict=True):
                writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), kind))
                done += size
                progress(done, sum(self.sizes))
        finally:
            writer.close()


# What is timed


@functools.cache
def _library() -> tuple[Any, list[str], Any]:
    """llama_cpp; the errors that it reports; and the function that takes them, which must not be collected.

    Of itself llama.cpp tells on stderr all that it finds in a file.
    """
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, errors, log


def about_llama() -> dict[str, str]:
    """The version of the bindings, and for which instructions llama.cpp was compiled."""
    library, *_ = _library()
    return {"version": library.__version__, "built_with": library.llama_print_system_info().decode()}


class LlamaModel:
    """A GGUF in llama.cpp, on the CPU, and a cache for one sequence.

    cache: the form of its keys and values, one of FORMS; float16 is llama.cpp's default. flash: whether it
    may use flash attention, which rounds keys and values to float16 even where the cache is float32. Whatever
    is not said here has llama.cpp's default.
    Raises ValueError, with llama.cpp's own words, where the file cannot be loaded.
    """

    def __init__(
        self,
        file: Path,
        config: QwenConfig,
        positions: int,
        threads: int,
        cache: str = "f16",
        flash: bool = True,
    ) -> None:
        self.config = config
        library, errors, _ = _library()
        of_model = library.llama_model_default_params()
        of_model.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(bytes(file), of_model)
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = positions  # a batch: what one call takes
        settings.n_ubatch = min(_UBATCH, positions)
        settings.n_threads = settings.n_threads_batch = threads
        settings.offload_kqv = settings.op_offload = False
        settings.type_k = settings.type_v = getattr(library, f"GGML_TYPE_{cache.upper()}")
        if not flash:
            settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._model and library.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise InputError(
                f"llama.cpp cannot use its GGUF: {'; '.join(errors[-2:]) or 'it does not say why'}"
            )

    def append(self, ids: list[int]) -> Tensor:
        """Logits (V,) of the token that follows, in float32: valid until the next call."""
        library, errors, _ = _library()
        tokens = (library.llama_token * len(ids))(*ids)
        code = library.llama_decode(self._context, library.llama_batch_get_one(tokens, len(ids)))
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}: {'; '.join(errors[-2:])}")
        logits = library.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(numpy.ctypeslib.as_array(logits, (self.config.vocab_size,)))

    def logits(self, ids: list[int]) -> Tensor:
        """Logits (T, V) of all positions of a new sequence, in float32, taken in one call."""
        library, errors, _ = _library()
        self.clear()
        batch = library.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, token in enumerate(ids):
                batch.token[position], batch.pos[position], batch.logits[position] = token, position, 1
                batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            code = library.llama_decode(self._context, batch)
        finally:
            library.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}: {'; '.join(errors[-2:])}")
        rows = library.llama_get_logits(self._context)
        shape = (len(ids), self.config.vocab_size)
        return torch.from_numpy(numpy.ctypeslib.as_array(rows, shape).copy())

    def clear(self) -> None:
        """Forgets the sequence."""
        library, *_ = _library()
        library.llama_memory_clear(library.llama_get_memory(self._context), False)

    def close(self) -> None:
        library, *_ = _library()
        if self._context:
            library.llama_free(self._context)
        if self._model:
            library.llama_model_free(self._model)
        self._context = self._model = None


def _serve(pipe: Connection, file: Path, config: QwenConfig, positions: int, threads: int) -> None:
    """The process: for each (whether a sequence begins, ids) that comes, the id that follows goes back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the bench, and that ends the pipe
    try:
        model = LlamaModel(file, config, positions, threads)
    except InputError as error:
        return pipe.send(error)
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while True:
            begins, ids = pipe.recv()
            if begins:
                model.clear()
            pipe.send(int(model.append(ids).numpy().argmax()))


class LlamaProcess:
    """A LlamaModel in a process of its own, with as many threads as torch has here.

    llama.cpp configures the tiles of Intel's AMX once in each thread. torch, in the same threads, releases
    them, and llama.cpp's next product would end the process. Here only this process ends, if it must.
    """

    def __init__(self, file: Path, config: QwenConfig, positions: int) -> None:
        self.config = config
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, file, config, positions, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        if problem := self._answer():
            self.close()
            raise problem

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise InputError(
                f"llama.cpp has crashed: its process ended with {self._process.exitcode}; it may be compiled "
                "for another processor, or by a compiler that has a fault: see the README.md of bench/"
            ) from None

    def next(self, ids: list[int], begins: bool) -> int:
        """The likeliest token behind ids, which begin a sequence or are appended to it."""
        with contextlib.suppress(BrokenPipeError):  # _answer says so
            self._pipe.send((begins, ids))
        return self._answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.terminate()  # it may be in a long prompt
        self._process.join()


class LlamaSubject(Subject):
    """llama.cpp, one sequence at a time."""

    def settle(self) -> None:
        # torch's threads spin for some milliseconds after their last work, and would hold up another process.
        time.sleep(_SPINNING)

    def prefill(self, ids: Tensor, more: int) -> Tensor:
        return ids.new_tensor([[self.model.next(ids[0].tolist(), True)]])

    def decode(self, ids: Tensor) -> Tensor:
        return ids.new_tensor([[self.model.next(ids[0].tolist(), False)]])


@contextlib.contextmanager
def llama_subject(ours: Qwen, form: str, positions: int) -> Iterator[LlamaSubject]:
    """llama.cpp with the weights of a plain model. The GGUF is removed at the end."""
    file = Gguf(ours, form)
    with temporary_folder(sum(file.sizes), f"a GGUF in {form}", "TMPDIR names another folder") as folder:
        path = folder / "model.gguf"
        with Progress("writing a GGUF,") as progress:
            file.write(path, progress.update)
        config = ours.config
        del ours, file  # llama.cpp has a copy of its own
        with contextlib.closing(LlamaProcess(path, config, positions)) as model:
            yield LlamaSubject(f"llama.cpp {form}", model)
