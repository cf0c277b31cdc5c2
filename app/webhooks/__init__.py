"""Webhooks: told of job ends and endpoint moves by signed requests, to public addresses alone."""
