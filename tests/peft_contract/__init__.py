"""What PEFT checks of every method of its own, in `tests/testing_common.py` and `test_custom_models.py`.

The checks are said anew here, on tiny random models of the families that PEFT tests, each with full TOAST,
TOAST-Lite, and the upper blocks alone. Where TOAST deviates on purpose, the refusal is the test.
"""
