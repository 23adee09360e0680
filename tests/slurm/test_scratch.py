import pytest, time
def test_train(slurm, tiny):
    t=time.time()
    job = slurm.sbatch("pretrain_moma.sh", *tiny, START="deepspeed")
    slurm.until(lambda: slurm.steps(tiny) >= 2, job)
    slurm.run("scancel","--batch","--signal=USR1",job)
    shown = slurm.ended(job)
    print(shown, time.time()-t)
    print(slurm.log(job))
