"""Engines: from priced tables to the time of a step."""
