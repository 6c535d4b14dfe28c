"""Machine forms: pure functions of tensors that equal the plain formulas and run faster."""
