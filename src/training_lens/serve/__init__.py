"""Prompts over HTTP: the OpenAI API in front of the generator."""
