"""The parity kit: where another implementation of Qwen differs from this one, and why.

    from qwen_ref import parity
    truth = parity.record("Qwen-1_8B", ids, "truth.safetensors")     # float64, every stage
    parity.write_bundle("port.safetensors", ids, {"logits": logits}, dtype="bfloat16")
    parity.diff("truth.safetensors", "port.safetensors").first_beyond
    parity.diagnose("Qwen-1_8B", "port.safetensors").found

`python -m qwen_ref.parity` does the same from a shell. bundle.py has the format, stages.py runs the model
with its stages in sight, compare.py measures, mistakes.py and diagnosis.py find out why.
"""

from typing import TYPE_CHECKING

from qwen_ref.commands.lazy import lazy

if TYPE_CHECKING:
    from qwen_ref.parity.bundle import Bundle, read_bundle, weights_checksum, write_bundle
    from qwen_ref.parity.compare import Comparison
    from qwen_ref.parity.diagnosis import Diagnosis, diagnose
    from qwen_ref.parity.making import make
    from qwen_ref.parity.recording import check, diff, record

__all__ = [
    "Bundle",
    "Comparison",
    "Diagnosis",
    "check",
    "diagnose",
    "diff",
    "make",
    "read_bundle",
    "record",
    "weights_checksum",
    "write_bundle",
]

__getattr__, __dir__ = lazy(
    __name__,
    bundle=["Bundle", "read_bundle", "weights_checksum", "write_bundle"],
    compare=["Comparison"],
    diagnosis=["Diagnosis", "diagnose"],
    making=["make"],
    recording=["check", "diff", "record"],
)
