"""The checker of the house's laws fails when it should, and only then.

Each law of .ci/laws.py is shown a small tree that breaks it and one that looks
as if it did.  Whether this repository keeps the laws is .ci/run's question.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parent.parent / ".ci"
if not CI.is_dir():  # a source distribution carries the tests but not the CI
    pytest.skip("the laws are checked in a clone of the repository", allow_module_level=True)
sys.path.insert(0, str(CI))

import c_source  # noqa: E402
import laws  # noqa: E402


def c_body(lines: int) -> str:
    return "static int *\nlong_one(int x)\n{\n" + "    x++;\n" * (lines - 4) + "}\n"


def py_body(lines: int, docstring: str = "") -> str:
    return f"def long_one(x):\n{docstring}" + "    x += 1\n" * (lines - 1)


BAD = [
    (laws.long_functions, {"csrc/a.c": c_body(61)}, "csrc/a.c:1: function long_one has 61 lines"),
    (laws.long_functions, {"csrc/a.c": "struct s { int x; };\n" + c_body(61)}, "csrc/a.c:2: function long_one"),
    (laws.long_functions, {"csrc/t.h": c_body(61).replace("long_one", "NAME(soften)")}, "function NAME(soften) has"),
    (laws.long_functions, {"csrc/a.c": c_body(61).replace("x++;", 'p("}{"); /* } */', 1)}, "has 61 lines"),
    (laws.long_functions, {"csrc/a.c": c_body(61).replace("(int x)", "(int x) __attribute__((pure))")}, "has 61 lines"),
    (laws.long_functions, {"tools/a.py": py_body(61)}, "tools/a.py:1: function long_one has 61 lines"),
    (laws.long_functions, {"a.py": "class C:\n    async " + py_body(61).replace("\n", "\n    ")}, "a.py:2: function"),
    (laws.long_files, {"csrc/a.c": "\n" * 401}, "csrc/a.c: 401 lines"),
    (laws.long_files, {"gqa_ext/_core.pyi": "\n" * 401}, "401 lines"),
    (laws.long_files, {".ci/run": "\n" * 401}, "401 lines"),
    (laws.long_macros, {"csrc/a.h": "#define F(x) \\\n g(x); \\\n g(x); \\\n g(x)\n"}, "csrc/a.h:1: macro of 4 lines"),
    (laws.long_macros, {"csrc/a.h": "\n # define F \\\n/*\n*/ 1 \\\n + 1 \n"}, "csrc/a.h:2: macro of 4 lines"),
    (laws.functions_in_macros, {"csrc/a.h": "#define F(T) static T f(T x) { return x; }\n"}, "csrc/a.h:1:"),
    (laws.functions_in_macros, {"csrc/a.h": "#define F(T) \\\n  void do_##T(T *x) \\\n  { g(x); }\n"}, "csrc/a.h:1:"),
    (laws.functions_in_macros, {"csrc/a.h": "#define F(T) T *name##T(void) { while (x) {} }\n"}, "csrc/a.h:1:"),
    (laws.intrinsics_outside_simd, {"csrc/a.c": "\n#include <immintrin.h>\n"}, "csrc/a.c:2: immintrin.h"),
    (laws.intrinsics_outside_simd, {"csrc/isa/neon.c": "#include <arm_neon.h>\n"}, "arm_neon.h"),
    (laws.intrinsics_outside_simd, {"csrc/a.c": "x = _mm256_add_ps(x, y);\n"}, "_mm256_add_ps"),
    (laws.intrinsics_outside_simd, {"tests/c/a.c": "_mm_pause();\n"}, "_mm_pause"),
    (laws.intrinsics_outside_simd, {"csrc/a.h": "typedef __m512d vec;\n"}, "__m512d"),
    (laws.intrinsics_outside_simd, {"csrc/a.c": "x = vfmaq_f32(x, y, z);\n"}, "vfmaq_f32"),
    (laws.intrinsics_outside_simd, {"csrc/a.c": "x = vdupq_n_f64(y);\n"}, "vdupq_n_f64"),
    (laws.intrinsics_outside_simd, {"csrc/a.c": "float32x4_t x;\n"}, "float32x4_t"),
    (laws.intrinsics_outside_simd, {"csrc/a.c": "__builtin_ia32_pause();\n"}, "__builtin_ia32_pause"),
    (laws.circles, {"csrc/a.h": '#include "b.h"\n', "csrc/b.h": '#include "a.h"\n'}, "include circle: csrc/"),
    (laws.circles, {"csrc/a.h": '#include "a.h"\n'}, "include circle: csrc/a.h"),
    (laws.circles, {"csrc/x/a.h": '#include "../b.h"\n', "csrc/b.h": '#include "x/a.h"\n'}, "include circle"),
    (laws.circles, {"gqa_ext/a.py": "from .b import f\n", "gqa_ext/b.py": "from . import a\n"}, "import circle"),
    (laws.circles, {"gqa_ext/__init__.py": "from . import a\n", "gqa_ext/a.py": "import gqa_ext\n"}, "import circle"),
    (laws.circles, {"gqa_ext/c/a.py": "from ..b import f\n", "gqa_ext/b.py": "from .c import a\n"}, "import circle"),
    (laws.upward_includes, {"csrc/gqa.h": '#include "pool.h"\n', "csrc/pool.h": ""}, "bottom of the house"),
    (laws.upward_includes, {"csrc/simd/a.h": '#include "../kernels.h"\n', "csrc/kernels.h": ""}, "the words know"),
    (laws.upward_includes, {"csrc/view.c": '#include "simd/avx2.h"\n', "csrc/simd/avx2.h": ""}, "through kernels.h"),
    (laws.upward_includes, {"csrc/view.c": "#include <Python.h>\n"}, "only csrc/python knows Python"),
    (laws.upward_includes, {"csrc/view.h": '#include "numpy/arrayobject.h"\n'}, "only csrc/python knows NumPy"),
    (laws.upward_includes, {"csrc/view.c": '#include "python/a.h"\n', "csrc/python/a.h": ""}, "does not know Python"),
    (laws.upward_includes, {"csrc/a.c": '#include "b.c"\n', "csrc/b.c": ""}, "compiled, not included"),
    (laws.foreign_imports, {"gqa_ext/a.py": "def f():\n    import torch.nn\n"}, "imports torch.nn"),
    (laws.foreign_imports, {"gqa_ext/a.py": "from scipy import linalg\n"}, "imports scipy"),
    (laws.foreign_imports, {"tests/reference.py": "from gqa_ext import repeat_kv\n"}, "the oracle imports"),
    (laws.mentions_outside, {"README.md": "see .." + "/shared/DESIGN.md\n"}, "README.md:1: mentions"),
]

GOOD = [
    (laws.long_functions, {"csrc/a.c": c_body(60) + c_body(60)}),
    (laws.long_functions, {"csrc/a.c": "static const int table[] = {\n" + "    1,\n" * 99 + "};\n"}),
    (laws.long_functions, {"csrc/a.h": "struct __attribute__((aligned(64))) s {\n" + "    int x;\n" * 99 + "};\n"}),
    (laws.long_functions, {"a.py": py_body(60, '    """' + "words\n" * 99 + '    """\n')}),
    (laws.long_files, {"csrc/a.c": "\n" * 400, "README.md": "\n" * 401}),
    (laws.long_macros, {"csrc/a.h": "#define F(x) \\\n g(x); \\\n g(x)\n"}),
    (laws.functions_in_macros, {"csrc/a.h": "#define F(x) do { if (x) { g(x); } else if (y) { } } while (0)\n"}),
    (laws.functions_in_macros, {"csrc/a.h": "#define F(x) (struct s){.x = (x)}\n"}),
    (laws.intrinsics_outside_simd, {"csrc/simd/avx2.h": "#include <immintrin.h>\n_mm_pause();\n"}),
    (laws.intrinsics_outside_simd, {"csrc/a.c": '/* _mm_pause */ f("vfmaq_f32"); value_f32 = view_f64; // __m256\n'}),
    (laws.circles, {"csrc/a.h": '#include "b.h"\n', "csrc/b.h": '/* #include "a.h" */\n'}),
    (laws.circles, {"gqa_ext/__init__.py": "from .a import f\n", "gqa_ext/a.py": "from . import _core\n"}),
    (laws.upward_includes, {"csrc/python/a.c": '#include <Python.h>\n#include "b.h"\n', "csrc/python/b.h": ""}),
    (laws.upward_includes, {"csrc/isa/a.c": '#include "../simd/a.h"\n', "csrc/simd/a.h": "#include <math.h>\n"}),
    (laws.foreign_imports, {"gqa_ext/a.py": "import numpy as np\nfrom tqdm import tqdm\nfrom .b import torch\n"}),
    (laws.mentions_outside, {"README.md": "memory shared by processes, work/main\n"}),
]


@pytest.mark.parametrize(("law", "sources", "message"), BAD)
def test_breach_is_found(law, sources, message):
    breaches = list(law(sources))
    assert len(breaches) == 1
    assert message in breaches[0]


@pytest.mark.parametrize(("law", "sources"), GOOD)
def test_lawful_code_passes(law, sources):
    assert list(law(sources)) == []


def test_every_law_is_tried_both_ways():
    assert {law for law, _, _ in BAD} == set(laws.LAWS) == {law for law, _ in GOOD}


def test_branches_that_each_open_a_brace_are_refused():
    with pytest.raises(ValueError, match="braces do not balance"):
        list(c_source.c_functions("#if X\nvoid f(void) {\n#else\nvoid g(void) {\n#endif\n}\n"))


def test_exported_symbols(tmp_path):
    source, module = tmp_path / "m.c", tmp_path / "m.so"
    source.write_text("int PyInit_m(void) { return 0; }\nint leaked(void) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", module, source], check=True)
    assert list(laws.exported_symbols(module)) == ["m.so: exports leaked"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git lists the files")
@pytest.mark.parametrize(("text", "status"), [("int x;\n", 0), (c_body(61), 1)])
def test_exit_status(tmp_path, text, status):
    shutil.copytree(CI, tmp_path / ".ci", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "a.c").write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, tmp_path / ".ci" / "laws.py"], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.endswith(f" laws, {status} breaches\n")
