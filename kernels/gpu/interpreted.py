"""Whether kernels run in Triton's interpreter, on a CPU, and what it needs for that.

Importing this mends the interpreter in two places. With numpy 2.4 and later, which no longer turns an array of one
element into an index, a `range` over scalars of a kernel would fail. And a function that a kernel calls finds the
language as the launch prepared it, in place of preparing it anew, which took half of all time.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
# For kernels. The interpreter multiplies the bit patterns of bfloat16 as integers and turns fp8 into bfloat16 wrongly:
# there products are taken, and fp8 is widened, in float32.
INTERPRETED = tl.constexpr(IS_INTERPRETED)


def _mend() -> None:
    from triton.runtime import interpreter

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def unless_done(function: Any) -> Any:
        used = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        is_done = not any(tl.core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if is_done else patch_language(function)

    interpreter._patch_lang_tensor = with_index
    interpreter._patch_lang = unless_done


if IS_INTERPRETED:
    _mend()
