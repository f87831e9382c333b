"""The evaluation program: accuracy with intervals, costs, controls and plots of trained runs."""
