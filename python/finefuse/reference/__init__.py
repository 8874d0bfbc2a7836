"""The operations as a person writes them: float64 NumPy, no kernels. The truth of the tests."""
