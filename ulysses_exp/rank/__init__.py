"""One rank: process group, session, engine, and what it works with."""
