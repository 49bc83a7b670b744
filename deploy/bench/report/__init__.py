"""The report of a benchmark: one HTML file that asks the network for nothing."""

from deploy.bench.report.page import render as render
