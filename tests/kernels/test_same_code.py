# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The comparison of machine code: names and order of arithmetic do not matter, operands do."""

from __future__ import annotations

from tests.kernels.same_code import effects

CODE = """
.reg .b32 %r<9>;
ld.param.b32 %r1, [kernel_param_0];
ld.param.b32 %r2, [kernel_param_1];
sub.s32 %r3, %r1, %r2;
add.s32 %r4, %r3, %r1;
setp.eq.s32 %p1, %r4, 0;
@%p1 bra $L__BB0_2;
st.global.b32 [%rd1], {%r4};
$L__BB0_2:
ret;
"""


def changed(before: str, after: str) -> list[str]:
    assert before in CODE
    return effects(CODE.replace(before, after))


def test_names_and_order_do_not_matter() -> None:
    assert effects(CODE)
    assert changed("%r3", "%r7") == effects(CODE)
    assert changed("$L__BB0_2", "$L__BB3_8") == effects(CODE)
    assert changed("add.s32 %r4, %r3, %r1", "add.s32 %r4, %r1, %r3") == effects(CODE)


def test_operands_and_effects_matter() -> None:
    assert changed("sub.s32 %r3, %r1, %r2", "sub.s32 %r3, %r2, %r1") != effects(CODE)
    assert changed("%r4, 0;", "%r4, 1;") != effects(CODE)
    assert changed("{%r4}", "{%r3}") != effects(CODE)
    assert changed("@%p1 bra", "@!%p1 bra") != effects(CODE)
    assert changed("st.global.b32 [%rd1], {%r4};\n", "") != effects(CODE)
