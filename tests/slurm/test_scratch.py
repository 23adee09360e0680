import pytest, time
def test_train(slurm, tiny):
    t=time.time()
    job = slurm.sbatch("pretrain_moma.sh", *tiny)
    shown = slurm.ended(job)
    print(shown, time.time()-t)
    print(slurm.log(job))
