"""Tests of facts that only a host with bhyve can confirm."""
