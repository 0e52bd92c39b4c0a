"""Certificates: proofs and refutations that integer layers fit their accumulators.

Called, this package is `accaware.certify.model.certify`: importing any module of it makes `accaware.certify` the
package, and `aa.certify(model)` must go on working.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, model: Any) -> Any:
        from accaware.certify.model import certify

        return certify(model)


sys.modules[__name__].__class__ = _Package
