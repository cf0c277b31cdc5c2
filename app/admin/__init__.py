"""Operations: is the process up, is the service ready, which bases and methods are there."""
