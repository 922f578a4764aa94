"""The lab: sweeps over loads, interference on the host's CPU, plots and reports. How to read them: blinkimp/lab/LAB.md."""
