# SPDX-License-Identifier: Apache-2.0
"""Benchmarks behind `fastbb bench` and the repository's `bench/` folder."""
